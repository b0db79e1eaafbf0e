import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from lightning_unlearn.report import RunRecord, render_report, write_report
from lightning_unlearn.report.charts import bars, curve_charts, heat_map, histogram, precision_chart, sensitivities
from lightning_unlearn.report.svg import SvgCanvas, shortened, ticks
from lightning_unlearn.results.mask import NeuronMask
from tests.callbacks.published import make_partition
from tests.report.runs import BREAKING, HOSTILE, INPUT, LABEL, NAMES, SUSPECTS, hostile_record, provenance_of

VOID = {"meta", "img", "br", "input", "link"}


class Page(HTMLParser):
    """The elements of a page, its texts, and what its scripts hold."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.scripts, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.texts).append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def page():
    return Page(render_report(hostile_record()))


def test_every_element_is_closed(page):
    assert page.open == []
    assert page.elements[0][0] == "html"


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert name not in attributes, (tag, attributes)
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:;")
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", render_report(hostile_record())).replace("http-equiv", "")


def test_what_comes_from_the_data_is_text(page):
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for text in (HOSTILE, BREAKING, f"All is {HOSTILE}", f"it is {HOSTILE}", NAMES[0]):
        assert re.sub(r"\s+", " ", text) in page.text


def test_signs_that_are_none_are_replaced(tmp_path):
    odd = "a\x00b\x0b\ud800c"
    record = hostile_record(class_names=[odd] * 4, fit={"model": odd}, gallery={0: {"kind": "text", "text": odd}})
    text = write_report(record, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a\x00b\x0b?c" in text
    assert Page(text).data()["names"][0] == odd


def test_the_data_in_the_script_are_as_they_were(page):
    data = page.data()
    assert data["names"] == NAMES
    assert data["samples"][0]["card"] == {"kind": "text", "text": BREAKING}
    assert len(page.scripts) == 2
    assert not set("<>&\u2028") & set(page.scripts[0])


def test_the_gallery_holds_the_suspects_the_most_suspect_first(page):
    samples = page.data()["samples"]
    assert [sample["index"] for sample in samples] == list(range(SUSPECTS))
    assert samples[7] == {
        "index": 7,
        "given": [3],
        "suggested": [0],
        "sure": 1.0,
        "p": 0.07,
        "told": True,
        "support": 1.0,
        "reason": "label",
        "list": "suspect",
        "action": "dropped",
        "new": [],
        "person": False,
        "card": {"kind": "table", "rows": [[HOSTILE, BREAKING]]},
        "duplicates": [],
    }


def test_duplicates_say_whether_their_label_is_another():
    card = {"kind": "text", "text": "a"}
    others = [{"index": 1, "exact": True, "src": "https://example.org/a.png"}, {"index": 4, "exact": False}]
    record = hostile_record(gallery={0: {**card, "duplicates": others}, 1: card})
    first, second = Page(render_report(record)).data()["samples"]
    # Without an address that is not the picture itself.
    assert first["duplicates"] == [
        {"index": 1, "exact": True, "given": [1], "same": False},
        {"index": 4, "exact": False, "given": [0], "same": True},
    ]
    assert (first["card"], second["duplicates"]) == (card, [])


def test_numbers(page):
    for text in (
        "40 of 100 training samples are suspect",
        "37.5% estimated noise rate",
        f"{LABEL} suspect for their label",
        f"{INPUT} suspect for their input",
        "40% of the suspect labels memorized",
        "0.500 \u2192 0.750 validation accuracy",
        "2 neurons pruned",
        "All 40, by dataset index",
        "Done, from epoch 1 on",
        "30 samples dropped",
        "10 samples re-labeled",
        "Computed 2 times",
    ):
        assert text in page.text


@pytest.mark.parametrize(
    ("before", "after", "best", "words"),
    [
        (0.5, 0.75, None, "0.500 \u2192 0.750 validation accuracy, before and after: a gain"),
        (0.5, 0.75, 0.5, "0.500 \u2192 0.750 validation accuracy, before and after: a gain"),
        (0.5, 0.75, 0.9, "0.500 \u2192 0.750 validation accuracy, before and after; 0.900 at best before: a loss"),
        (0.5, 0.75, 0.749, "; 0.749 at best before: no meaningful gain"),
        (0.75, 0.5, None, "0.750 \u2192 0.500 validation accuracy, before and after: a loss"),
    ],
)
def test_accuracy_is_compared_with_the_best_before_and_a_loss_is_called_one(before, after, best, words):
    summary = {"accuracy_before": before, "accuracy_after": after, "best_accuracy_before": best, "done": ["pruned"]}
    record = replace(hostile_record(), summary=summary)
    html = render_report(record)
    assert words in Page(html).text
    assert ('class="pair loss"' in html) is words.endswith("a loss")
    for nothing_done in ({"fit": {"dry run": "yes"}}, {"summary": {**summary, "done": []}}):
        text = Page(render_report(replace(record, **nothing_done))).text
        assert "a loss" not in text
        assert "a gain" not in text


def test_it_says_where_the_result_comes_from(page):
    dropped = ", ".join(str(index) for index in range(SUSPECTS) if index % 4)
    for text in (
        f"30 samples dropped from epoch 1 on {dropped}",
        f"{NAMES[0]} {NAMES[1]} 10 0, 4, 8, 12, 16, 20, 24, 28, 32, 36",
        f"2 neurons of {HOSTILE} pruned 0, 1",
        f"Decided by a person in {BREAKING} : 1 to keep, 1 to drop, 1 to relabel.",
        f"seed 17 processes 2 {HOSTILE} {HOSTILE}",
        f"{HOSTILE} {BREAKING} layers one, 2,",
        f"samples 100 fingerprint {HOSTILE}",
    ):
        assert re.sub(r"\s+", " ", text).replace(" :", ":") in page.text.replace(" :", ":"), text


def test_a_sample_that_a_person_has_kept_is_shown_behind_the_suspects():
    record = hostile_record()
    page = Page(render_report(replace(record, gallery={50: {"kind": "text", "text": "kept"}, **record.gallery})))
    last = page.data()["samples"][-1]
    assert (last["index"], last["reason"], last["action"], last["person"]) == (50, "none", "kept", True)
    assert "All 40, by dataset index (#), and 1 that a person has kept" in page.text


def test_the_control_is_said_to_be_one():
    record = hostile_record()
    control = replace(record, fit={"model": "Other", "finished": "yesterday", "dry run": "yes"})
    page = Page(render_report(record, control))
    assert "Dashed: the control, Other \u00b7 yesterday, a dry run." in page.text
    assert "val_acc, control: 0.9 in the end" in page.text


def test_samples_drawn_by_their_probability_are_counted():
    weighed = provenance_of(dropped=[0, 1], relabeled=[], weighed=True)
    assert "38 drawn by their probability" in Page(render_report(hostile_record(provenance=weighed))).text


def test_where_nothing_was_done_the_page_proposes():
    page = Page(render_report(hostile_record(provenance=provenance_of(from_epoch=None, dropped=[], relabeled=[]))))
    assert page.data()["actions"] == ["keep", "drop", "relabel"]
    assert "No sample was dropped or re-labeled" in page.text
    assert "samples dropped from epoch" not in page.text


def test_an_address_that_is_not_the_content_itself_is_left_out():
    cards = {
        0: {"kind": "image", "src": "https://example.org/x.png"},
        1: {"kind": "audio", "src": "data:audio/wav;base64,AAAA", "picture": "data:text/html;base64,AAAA"},
        2: {"kind": "image", "src": 'data:image/png;base64,AA" onerror="alert(1)'},
    }
    samples = Page(render_report(hostile_record(gallery=cards))).data()["samples"]
    assert [sample["card"] for sample in samples] == [
        {"kind": "image"},
        {"kind": "audio", "src": "data:audio/wav;base64,AAAA"},
        {"kind": "image"},
    ]


def test_a_partition_alone_makes_a_page():
    page = Page(render_report(RunRecord(hostile_record().partition)))
    assert "The run directory holds no samples to show" in page.text
    assert page.open == []


def test_nothing_suspect():
    page = Page(render_report(RunRecord(make_partition(torch.ones(12), torch.arange(12) % 4))))
    assert "0 of 12 training samples are suspect" in page.text
    assert "No sample is suspect" in page.text


def test_the_least_sure_are_shown_where_none_is_suspect():
    partition = make_partition(torch.full((12,), 0.75), torch.arange(12) % 4)
    page = Page(render_report(RunRecord(partition, gallery={3: {"kind": "text", "text": "three"}})))
    assert "No sample is suspect; these 1 are the least sure all the same" in page.text
    assert "a person has kept" not in page.text
    assert [sample["index"] for sample in page.data()["samples"]] == [3]


def test_of_constant_neurons_there_is_no_picture():
    mask = NeuronMask("fc", torch.ones(3).bool(), torch.zeros(3))
    page = Page(render_report(hostile_record(masks=(mask,))))
    assert "fc: 0 of 3 neurons pruned, 3 constant and not drawn" in page.text
    assert "neurons, the most active for noise first" not in page.text


def test_several_labels_per_sample():
    base = hostile_record().partition
    label = torch.arange(200).reshape(100, 2) % 2
    partition = replace(base, label=label, suggested_label=1 - label, label_probability=torch.full((100, 2), 0.5))
    page = Page(render_report(hostile_record(partition=partition, class_names=["a", "b"])))
    assert page.data()["samples"][0]["given"] == [1]
    assert page.data()["samples"][0]["suggested"] == [0]


def test_suspects_for_their_input_are_no_confusion():
    base = hostile_record().partition
    only_input = replace(base, reason=torch.where(base.is_clean, 0, 2).to(torch.uint8))
    assert "Given and suggested classes" in Page(render_report(RunRecord(base))).text
    assert "Given and suggested classes" not in Page(render_report(RunRecord(only_input))).text


def test_more_classes_than_fit_into_a_picture():
    size = 400
    partition = make_partition(torch.full((size,), 0.1), torch.arange(size) % 100)
    partition = replace(partition, suggested_label=(partition.label + 1) % 100)
    assert "70 classes with fewer suspects are left out" in Page(render_report(RunRecord(partition))).text


def test_a_hundred_thousand_samples_are_a_matter_of_seconds_and_of_less_than_20_mb(tmp_path):
    record = hostile_record(100_000)
    picture = f"data:image/png;base64,{'A' * 60_000}"
    record = replace(record, gallery={index: {"kind": "image", "src": picture} for index in range(200)})
    probability = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    partition = make_partition(probability, torch.arange(100_000) % 4)
    # All that can be done is done to every other sample: these are the longest lists there are.
    suspects = partition.suspect_indices().tolist()
    moved = [{"index": index, "given": index % 4, "new": (index + 1) % 4} for index in suspects[::2]]
    provenance = provenance_of(dropped=suspects[1::2], relabeled=moved)
    record = replace(record, provenance=provenance)
    started = time.perf_counter()
    file = write_report(replace(record, partition=partition), tmp_path / "report.html")
    assert time.perf_counter() - started < 20
    assert 1_000_000 < file.stat().st_size < 20_000_000


def parts(markup, kind):
    return re.findall(rf'<(?:rect|circle|line|polyline) [^>]*class="{kind}"[^>]*>', str(markup))


def estimated(interval=(0.3, 0.5), **changes):
    """Two suspects, and two samples that are worth a look."""
    clean = torch.tensor([0.9, 0.1, 0.52, 0.05, 0.45, 0.99])
    is_clean = clean > 0.2
    parts = {"is_clean": is_clean, "reason": (~is_clean).to(torch.uint8), "noise_rate": 0.375}
    parts |= {"noise_rate_interval": interval, "often_called": ((1, 0, 0.5),)} | changes
    return replace(make_partition(clean, torch.arange(6) % 4), **parts)


def test_both_lists_and_what_to_expect_of_them():
    record = RunRecord(estimated(), class_names=list("abcd"), gallery={3: {}, 1: {}, 4: {}, 2: {}})
    page = Page(render_report(record))
    assert "About 37.5% of the labels (30.0% to 50.0%) look wrong; 2 sus" in page.text
    assert "; the next 2 are worth a look; 'b' is often labeled 'a' (50%)." in page.text
    assert "All 2, and all of 2 that are worth a look after them, by dataset index" in page.text
    assert "lightning-unlearn show . --review --csv suspects.csv" in page.text
    assert "92% of the suspects expected to be wrong" in page.text
    assert "the longest list of which at least 85% are expected to be wrong" in page.text
    assert [sample["list"] for sample in page.data()["samples"]] == ["suspect", "suspect", "review", "review"]


def test_a_lower_bound_is_told_as_such_and_no_rate_is_told_where_none_is_suspect():
    open_end = Page(render_report(RunRecord(estimated((0.3, 1.0))))).text
    assert "About 37.5% of the labels look wrong (at least 30.0%)" in open_end
    assert "30.0% look wrong at least" in open_end
    none = torch.ones(6, dtype=torch.bool)
    nothing = estimated(is_clean=none, reason=torch.zeros(6, dtype=torch.uint8))
    text = Page(render_report(RunRecord(nothing))).text
    assert "37.5%" not in text
    assert "5 worth a look" in text


def test_the_chart_of_expected_precision_has_both_lists():
    drawn = str(precision_chart(estimated()))
    assert len(parts(drawn, "line suspect")) == len(parts(drawn, "line clean")) == 1
    assert "2 suspects" in drawn
    assert "2 more worth a look" in drawn
    assert precision_chart(replace(estimated(), noise_rate_interval=None)) is None


@pytest.mark.parametrize("size", [1, 2, 60])
@pytest.mark.parametrize("clean", [0.01, 0.99])
def test_the_chart_of_any_size(size, clean):
    found = make_partition(torch.full((size,), clean), torch.arange(size) % 4)
    assert str(precision_chart(replace(found, noise_rate_interval=(0.0, 1.0)))).startswith("<svg")


def test_the_histogram_counts_every_sample_once_and_marks_the_cut():
    probability = torch.tensor([0.0, 0.01, 0.49, 0.5, 1.0, 1.0, 1.0])
    drawn = str(histogram(make_partition(probability, torch.zeros(7, dtype=torch.int64))))
    counts = re.findall(r"to [\d.]+: (\d+) clean, (\d+) suspect", drawn)
    assert sum(int(clean) for clean, _ in counts) == 4
    assert sum(int(suspect) for _, suspect in counts) == 3
    assert "cut at 0.5" in drawn
    assert len(parts(drawn, "cut")) == 1


def test_the_heat_map_has_one_scale_the_share_of_the_rows_class():
    counts = torch.tensor([[9, 2, 0], [1, 9, 4], [0, 0, 9]])
    share = torch.tensor([[0.0, 0.2, 0.0], [0.25, 0.0, 1.0], [0.0, 0.0, 0.0]])
    drawn = str(heat_map(counts, ["a", "b", "c"], ("given", "suggested", "x"), share, [4, 5, 6]))
    shades = {
        (given, suggested, pair): float(opacity)
        for opacity, pair, given, suggested in re.findall(
            r'class="heat" fill-opacity="([\d.]+)"[^>]*data-pair="([^"]*)"[^>]*><title>given (\w), suggested (\w)',
            drawn,
        )
    }
    assert shades["b", "c", "5&gt;6"] == 1
    assert shades["a", "c", "4&gt;6"] == 0
    assert shades["a", "b", "4&gt;5"] == pytest.approx(0.08 + 0.92 * 0.2, abs=0.01)
    assert "given b, suggested c: 4 x" in drawn
    assert drawn.count("data-pair") == 6


def test_curves_are_drawn_by_kind_with_the_swap_and_the_control():
    curves = {"train_loss": [[0, 1.0], [1, 0.5]], "val_loss": [[0, 1.0], [1, 0.7]], "acc": [[0, 0.1], [1, 0.9]]}
    charts = curve_charts(curves, [1], {"val_loss": [[0, 1.0], [1, 2.0]]})
    assert [kind for kind, _ in charts] == ["loss", "acc"]
    loss = str(charts[0][1])
    assert len(parts(loss, r"line c\d")) == 4  # each with its key
    assert "val_loss, control: 2 in the end" in loss
    assert "clean subset from here" in loss
    # The higher the value, the further up.
    points = [float(y) for y in re.findall(r"[\d.]+,([\d.]+)", parts(loss, "line c0")[0])]
    assert points[0] < points[1]


def test_a_curve_of_one_epoch_or_of_one_value_is_no_trouble():
    assert curve_charts({"loss": [[0, 1.0]]}, []) == []
    assert len(curve_charts({"loss": [[0, 0.0], [1, 0.0]], "acc": [[0, 5.0], [1, 5.0]]}, [5])) == 2


def test_neurons_are_drawn_in_order_with_errors_and_the_pruned_ones_marked():
    mask = NeuronMask("fc", torch.tensor([1, 1, 0, 1]).bool(), torch.tensor([0.3, 0.0, -0.5, -0.1]), torch.ones(4))
    drawn = str(sensitivities(mask))
    assert re.findall(r"neuron (\d+): (\S+) \S+ (\d\.?\d*)", drawn) == [
        ("2", "-0.5", "2"),
        ("3", "-0.1", "2"),
        ("0", "0.3", "2"),
    ]
    assert len(parts(drawn, "neuron pruned")) == 1
    assert len(parts(drawn, "neuron bar")) == 2
    assert "nothing" not in str(sensitivities(NeuronMask("fc", torch.ones(2).bool(), torch.zeros(2))))


def test_of_many_neurons_the_ends_are_drawn():
    mask = NeuronMask("fc", torch.ones(500).bool(), torch.linspace(-1, 1, 500))
    drawn = str(sensitivities(mask))
    assert drawn.count("<circle") == 120
    assert "380 neurons between are not drawn" in drawn


def test_time_is_shown_with_its_share():
    drawn = str(bars([("pruning", 2.0), ("fit", 8.0)], 8.0))
    assert "2.00 s (25.0%)" in drawn
    assert float(re.findall(r'width="(\d+)" height="18"', drawn)[0]) == 75


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 30, [0, 10, 20, 30]),
        (-0.4, 0.61, [0, 0.5]),
        (-7, 0, [-6, -4, -2, 0]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)
    assert len(ticks(3.0, 3.0)) <= 6


def test_a_drawing_escapes_what_is_put_in():
    canvas = SvgCanvas(1, 1, '"><script>')
    canvas.text(0, 0, "<b>", class_='"x')
    assert "<script>" not in str(canvas.markup())
    assert "&lt;b&gt;" in str(canvas.markup())


def test_the_time_does_not_grow_with_the_square_of_a_names_length():
    seconds = []
    for length in (200_000, 2_000_000):
        started = time.perf_counter()
        shortened("cat " * (length // 4), 16), shortened("e" + "\u0301" * length, 16)
        seconds.append(time.perf_counter() - started)
    assert max(seconds) < 0.5
    assert shortened("class number 17 of many" * 1000, 12) == "class n\u2026many"
