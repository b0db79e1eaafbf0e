"""A person decides about samples in the report, with keys and clicks; the browser keeps it, and a fit goes by it."""

import csv
import io
import itertools
import json
import time
from dataclasses import replace

import pytest
import torch

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, UnlearnReport
from lightning_unlearn.report import RunRecord, write_report
from lightning_unlearn.report.media import data_uri, wav
from lightning_unlearn.results.labels import DECISIONS
from lightning_unlearn.results.review_csv import read_review
from tests.callbacks.published import make_partition
from tests.report.test_browser import PIXEL, choose, shown, where
from tests.toys import Blobs, BlobsData, Toy, fit

NAMES = ["cat, tabby", '=the "dog"', "\u7c73\u56fd; bird", "fish"]
SIZE = 60
PICTURE = {"kind": "image", "src": f"data:image/png;base64,{PIXEL}"}
FOCUSED = "document.activeElement.dataset.index"


def record_of(size=SIZE, **changes):
    """Samples that are all suspect, in their order, each for its label, which the next class is suggested for."""
    label = torch.arange(size) % 4
    partition = make_partition(torch.arange(size) / (2.5 * size), label)
    parts = {"suggested_label": (label + 1) % 4, "fingerprint": f"{size}:{'00aaaaaa' * 16}"}
    cards = {index: {**PICTURE, "file": f"{index % 4}/IMG_{index}.png"} for index in range(size)}
    return replace(RunRecord(replace(partition, **parts), gallery=cards, class_names=NAMES), **changes)


def open_new(browser, record, folder, state=""):
    """Writes a report, and opens it in a browser that has kept nothing."""
    browser.open(write_report(record, folder / "report.html"), state)
    browser.run("localStorage.clear()")
    browser.reload()


@pytest.fixture
def page(browser, tmp_path):
    open_new(browser, record_of(), tmp_path)
    yield browser
    assert browser.complaints() == []


def progress(page):
    return page.run("document.getElementById('progress').textContent")


def pressed(page, index):
    return page.run(
        f"[...document.querySelectorAll('.card[data-index=\"{index}\"] button[aria-pressed=true]')]"
        ".map(one => one.textContent)"
    )


def press_all(page, keys):
    for key in keys:
        page.press(key)


def press_download(page):
    """Goes from the card to the button by Tab, and presses it."""
    for _ in range(20):
        if page.run("document.activeElement.id") == "download":
            return page.press("Enter")
        page.press("Tab")
    raise AssertionError("the button is not reached by Tab")


def downloaded(page, folder, press=lambda page: page.click("#download")):
    """The table that the button gives, and its path."""
    page.downloads_to(folder)
    file = folder / "reviewed.csv"
    press(page)
    deadline = time.monotonic() + 20
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    text = file.read_bytes().decode()
    # So that Excel shows the names right.
    assert text[0] == "\ufeff"
    return file, list(csv.DictReader(io.StringIO(text[1:], newline="")))


@pytest.mark.parametrize("enlarged", [False, True])
def test_after_undo_of_a_hidden_sample_a_key_acts_on_what_is_shown(page, enlarged):
    press_all(page, ["ArrowRight", "d"])
    page.run("location.hash = 'class=3'")
    time.sleep(0.2)
    press_all(page, ["ArrowRight", "ArrowRight", *(["Enter"] if enlarged else [])])
    at = page.run("document.querySelectorAll('.card')[1].dataset.index")
    press_all(page, ["u", "k"])
    page.press("Escape")
    assert progress(page) == "1 of 60 decided"
    assert pressed(page, int(at)) == ["keep"]


def test_keys_decide_go_on_and_take_back(page):
    assert progress(page) == "0 of 60 decided"
    assert page.run("document.getElementById('undo').disabled")
    press_all(page, ["ArrowRight", "k", "d", "r", "1"])
    assert [pressed(page, index) for index in range(5)] == [["keep"], ["drop"], ["relabel"], ["relabel"], []]
    assert progress(page) == "4 of 60 decided"
    assert page.run(FOCUSED) == "4"
    page.press("u")
    assert (progress(page), pressed(page, 3), page.run(FOCUSED)) == ("3 of 60 decided", [], "3")
    page.press("ArrowLeft", 2)
    assert page.run(FOCUSED) == "1"
    page.press("k")
    assert pressed(page, 1) == ["keep"]
    page.press("u")
    assert pressed(page, 1) == ["drop"]
    columns = page.run(
        "(tops => tops.filter(top => top === tops[0]).length)"
        "([...document.querySelectorAll('.card')].map(card => card.offsetTop))"
    )
    page.press("ArrowDown")
    assert page.run(FOCUSED) == str(1 + columns)
    page.press("ArrowUp")
    assert page.run(FOCUSED) == "1"


def test_paper_shows_what_was_decided(page):
    press_all(page, ["ArrowRight", "k", "1", "r"])
    page.emulate(media="print")
    try:
        after = "getComputedStyle(card, '::after').content"
        said = page.run(f"[...document.querySelectorAll('.card')].slice(0, 4).map(card => {after})")
        assert said == ['"decided: keep"', '"decided: relabel to cat, tabby"', '"decided: relabel to fish"', "none"]
        assert page.run("document.querySelector('.decide').offsetHeight") == 0
    finally:
        page.emulate()
    page.reload()
    assert page.run("document.querySelector('.card').dataset.decision") == "keep"


def test_keys_go_over_the_ends_of_pages_and_back(page):
    press_all(page, ["ArrowRight", *["k"] * 24])
    page.wait("document.getElementById('where').textContent === '25 to 48 of 60'")
    page.wait(f"{FOCUSED} === '24'")
    page.press("ArrowLeft")
    page.wait(f"{FOCUSED} === '23'")
    page.press("ArrowRight")
    page.wait(f"{FOCUSED} === '24'")
    # What is taken back is shown.
    page.press("u")
    page.wait(f"{FOCUSED} === '23'")
    assert pressed(page, 23) == []


def test_buttons_and_the_chooser_do_the_same(page):
    page.click(".card[data-index='0'] [data-word=drop]")
    assert pressed(page, 0) == ["drop"]
    page.click(".card[data-index='0'] [data-word=drop]")
    assert pressed(page, 0) == []
    page.run("document.querySelector('.card[data-index=\"1\"] select').focus()")
    page.press("ArrowDown")
    page.wait("document.querySelector('.card[data-index=\"1\"] select').value === '3'")
    assert pressed(page, 1) == ["relabel"]
    # To give it the label that it has is to keep it.
    page.press("ArrowUp", 2)
    page.wait("document.querySelector('.card[data-index=\"1\"] [data-word=keep]').ariaPressed === 'true'")
    page.click("#undo")
    assert pressed(page, 1) == ["relabel"]


def test_keys_are_left_to_fields_and_to_the_page(page):
    page.run("document.getElementById('by-text').focus()")
    press_all(page, "k1d")
    page.run("document.activeElement.blur()")
    press_all(page, "kd1")
    assert progress(page) == "0 of 60 decided"


def test_the_browser_keeps_what_was_decided(page, browser):
    press_all(page, ["ArrowRight", "k", "d", "3"])
    page.reload()
    assert progress(page) == "3 of 60 decided"
    assert [pressed(page, index) for index in range(3)] == [["keep"], ["drop"], ["keep"]]
    (key,) = page.run("Object.keys(localStorage)")
    assert key.startswith("lightning-unlearn review n60-00")


def test_decisions_of_other_data_do_not_show(page, tmp_path):
    press_all(page, ["ArrowRight", "k", "d"])
    record = record_of()
    changed = replace(record.partition, label=(record.partition.label + 2) % 4)
    page.open(write_report(replace(record, partition=changed), tmp_path / "other.html"))
    assert progress(page) == "0 of 60 decided"


STRANGE = '{"0": 5, "x": {}, "1": {"word": "eat", "given": [1], "new": []}}'


@pytest.mark.parametrize("found", ["{", "[]", "null", STRANGE])
def test_nonsense_in_the_storage_is_survived(page, found):
    page.press("ArrowRight")
    page.press("k")
    page.run(f"localStorage.setItem(Object.keys(localStorage)[0], {json.dumps(found)})")
    page.reload()
    assert progress(page) == "0 of 60 decided"
    press_all(page, ["ArrowRight", "d"])
    assert pressed(page, 0) == ["drop"]


def test_a_browser_that_keeps_nothing_says_so(page, tmp_path):
    page.run("Storage.prototype.setItem = () => { throw new Error('full'); }")
    press_all(page, ["ArrowRight", "k", "d"])
    assert progress(page) == "2 of 60 decided"
    assert page.run("document.getElementById('unkept').offsetHeight > 0")
    assert [row["decision"] for row in downloaded(page, tmp_path)[1][:3]] == ["keep", "drop", ""]


def test_the_download_is_the_table_that_a_partition_writes_with_decisions(page, tmp_path):
    record = record_of()
    files = [card["file"] for card in record.gallery.values()]
    record.partition.to_csv(tmp_path / "suspects.csv", class_names=NAMES, columns={"file": files})
    with (tmp_path / "suspects.csv").open(encoding="utf-8-sig", newline="") as file:
        wanted = list(csv.DictReader(file))
    press_all(page, ["ArrowRight", "k", "d", "r", "1", "2"])
    file, rows = downloaded(page, tmp_path)
    assert [row["decision"] for row in rows] == ["keep", "drop", "relabel", "relabel", "relabel", *[""] * 55]
    assert (rows[4]["suggested_label"], rows[4]["suggested_class"]) == ("1", '\'=the "dog"')
    # But for the decisions, the same: sample 3 is suggested to be 0, sample 4 to be 1.
    for row in rows:
        row["decision"] = ""
    assert rows == wanted
    table = read_review(file)
    assert table.mark == "n60-" + "00" * 16
    assert [(row.index, DECISIONS[row.decision], row.new) for row in table.rows] == [
        *[(0, "keep", ()), (1, "drop", ()), (2, "relabel", (3,)), (3, "relabel", (0,)), (4, "relabel", (1,))]
    ]


def test_what_the_run_went_by_stays_in_the_table(browser, tmp_path):
    review = {"path": "a.csv", "keep": [0], "drop": [59], "relabel": [1]}
    record = record_of(provenance={"review": review})
    # No card of the last one.
    record.gallery.pop(59)
    open_new(browser, record, tmp_path, "size=96")
    assert progress(browser) == "2 of 59 decided"
    browser.click(".card[data-index='0'] [data-word=keep]")
    _, rows = downloaded(browser, tmp_path)
    found = {int(row["index"]): row["decision"] for row in rows if row["decision"]}
    assert found == {1: "relabel", 59: "drop"}
    assert browser.complaints() == []


def test_filters_hold_while_pages_are_turned(page):
    choose(page, "by-decided", "none yet")
    page.click(".card[data-index='0'] .labels")
    press_all(page, ["k"] * 24)
    # None is passed over, as would be if those that are decided left the list at once.
    page.wait(f"{FOCUSED} === '24'")
    choose(page, "by-decided", "keep")
    assert where(page) == "1 to 24 of 24"
    choose(page, "by-decided", "none yet")
    assert shown(page)[0] == "24"
    choose(page, "by-decided", "all")
    choose(page, "by-suggested", "fish (15)")
    assert set(shown(page, "given")) == {"2"}


def test_a_pair_of_classes_is_chosen_and_clicked(page):
    choose(page, "by-pair", 'cat, tabby \u2192 =the "dog" (15)')
    assert (set(shown(page, "given")), where(page)) == ({"0"}, "1 to 15 of 15")
    page.run(
        "document.querySelector('rect[data-pair=\"2>3\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    page.wait("document.querySelector('.card').dataset.given === '2'")
    assert set(shown(page, "given")) == {"2"}
    assert page.run("document.getElementById('by-pair').value") == "2>3"


@pytest.mark.parametrize(("text", "at"), [("3", "49 to 60 of 60"), ("99", "49 to 60 of 60"), ("0", "1 to 24 of 60")])
def test_a_page_is_gone_to_by_its_number(page, text, at):
    page.click("#after")
    page.wait("document.getElementById('where').textContent.startsWith('25')")
    page.run("document.getElementById('to-page').select()")
    page.call("Input.insertText", text=text)
    page.press("Enter")
    page.wait(f"document.getElementById('where').textContent === {json.dumps(at)}")
    page.run("document.activeElement.blur()")


@pytest.mark.parametrize(("text", "found"), [("17", ["17"]), ("#5", ["5"]), ("img_31.", ["31"]), ("nothing", [])])
def test_a_sample_is_found_by_its_index_or_file(page, text, found):
    page.run("document.getElementById('by-text').focus()")
    page.call("Input.insertText", text=text)
    page.wait(f"document.querySelectorAll('.card').length === {len(found)}")
    assert shown(page) == found
    assert page.run("document.activeElement.id") == "by-text"


def test_a_click_enlarges_and_keys_go_on_there(page):
    page.click(".card[data-index='2'] img")
    assert page.run("document.querySelector('dialog').open")
    assert page.run("document.querySelector('dialog img').getBoundingClientRect().width") > 300
    press_all(page, ["d", "ArrowRight", "k"])
    assert page.run("document.querySelector('dialog .index').textContent") == "#5"
    page.press("Escape")
    page.wait("!document.querySelector('dialog').open")
    page.wait(f"{FOCUSED} === '5'")
    assert [pressed(page, index) for index in (2, 3, 4)] == [["drop"], [], ["keep"]]
    page.press("Enter")
    assert page.run("document.querySelector('dialog .index').textContent") == "#5"
    page.click("dialog img")
    page.wait("!document.querySelector('dialog').open")


def test_the_space_bar_plays_and_stops_a_sound(browser, tmp_path):
    sound = data_uri("audio/wav", wav(torch.zeros(80_000).numpy(), 8000))
    cards = {index: {"kind": "audio", "src": sound, "note": "10 s"} for index in range(2)}
    browser.open(write_report(record_of(gallery=cards), tmp_path / "report.html"))
    playing = "[...document.querySelectorAll('audio')].map(one => !one.paused)"
    press_all(browser, ["ArrowRight", " "])
    assert browser.run(playing) == [True, False]
    press_all(browser, ["ArrowRight", " "])
    assert browser.run(playing) == [False, True]
    browser.press(" ")
    assert browser.run(playing) == [False, False]
    assert browser.complaints() == []


def test_without_a_suggestion_a_class_has_to_be_picked(browser, tmp_path):
    record = record_of()
    same = replace(record.partition, suggested_label=record.partition.label)
    open_new(browser, replace(record, partition=same), tmp_path)
    press_all(browser, ["ArrowRight", "r"])
    assert browser.run("document.activeElement.tagName") == "SELECT"
    assert progress(browser) == "0 of 60 decided"


def test_classes_that_are_digits_are_picked_by_their_digit(browser, tmp_path):
    open_new(browser, record_of(class_names=[]), tmp_path)
    press_all(browser, ["ArrowRight", "2", "0"])
    assert [row["suggested_label"] for row in downloaded(browser, tmp_path)[1][:2]] == ["2", "0"]
    assert progress(browser) == "2 of 60 decided"


def test_of_several_labels_each_is_added_or_taken_away(browser, tmp_path):
    label = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    suggested = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0]])
    parts = {"label": label, "suggested_label": suggested, "label_probability": torch.ones(2, 4)}
    found = replace(make_partition(torch.full((2,), 0.1), torch.zeros(2, dtype=torch.int64)), **parts)
    record = RunRecord(found, gallery={0: PICTURE, 1: PICTURE}, class_names=NAMES)
    open_new(browser, record, tmp_path)
    # Of the first: its suggestion, with class 1 and without class 0.
    press_all(browser, ["ArrowRight", "2", "1", "ArrowRight", "r"])
    file, rows = downloaded(browser, tmp_path)
    cells = {row["index"]: (row["suggested_label"], row["suggested_class"]) for row in rows}
    assert cells == {"0": ("1", '\'=the "dog"'), "1": ("1 2", '\'=the "dog"; \u7c73\u56fd; bird')}
    assert [row.new for row in read_review(file).rows] == [(1,), (1, 2)]
    assert browser.complaints() == []


# Elements that are made, queries of the page, and characters that the browser's storage is given.
COUNT_WORK = """
    globalThis.work = { elements: 0, queries: 0, written: 0 };
    for (const [of, name, count, by] of [
      [Document.prototype, "createElement", "elements", () => 1],
      [Element.prototype, "querySelector", "queries", () => 1],
      [Element.prototype, "querySelectorAll", "queries", () => 1],
      [Storage.prototype, "setItem", "written", (_, text) => text.length],
    ]) {
      const before = of[name];
      of[name] = function (...given) { work[count] += by(...given); return before.apply(this, given); };
    }
"""


def test_five_thousand_cards_stay_quick(browser, tmp_path):
    # Work is counted, as time depends on what else the machine does.
    def work(samples):
        open_new(browser, record_of(samples), tmp_path, "size=96")
        browser.run(COUNT_WORK)
        made = [browser.run("Object.values(work)")]
        for keys in (["ArrowRight"], ["k"], ["d"], ["u"], ["k"]):
            press_all(browser, keys)
            made.append(browser.run("Object.values(work)"))
        return [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(made)]

    few, many = work(200), work(5_000)
    # A key does as much among 5,000 samples as among 200, and makes no card anew.
    assert many == few
    assert all(elements == 0 for elements, _, _ in many)
    browser.click("#after")
    browser.wait("document.getElementById('where').textContent === '97 to 192 of 5000'")
    # Of the cards on the page alone.
    assert browser.run("work.elements") < 96 * 60
    assert progress(browser) == "2 of 5000 decided"


def test_without_scripts_the_page_is_read(browser, tmp_path):
    file = write_report(record_of(), tmp_path / "report.html")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url=file.as_uri())
        browser.wait("document.querySelector('footer') !== null")
        text = browser.run("document.querySelector('main').innerText")
        assert "The first 50 of 60 samples" in text
        assert "2/IMG_2.png" in text
        # Nothing that does nothing.
        assert "your decision" not in text
        assert "download decisions" not in text
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def a_fit(folder, review=None):
    partition = AttributionPartitionCallback(at_epoch=2, review=review)
    finetune = CleanSubsetFinetuneCallback(on_noisy="relabel")
    callbacks = [partition, finetune, UnlearnReport(folder, samples=50)]
    fit(Toy(), BlobsData(Blobs(image=False)), callbacks, max_epochs=3)
    return partition.partition, finetune.training_subset


def decide_all(page, label):
    """Keeps, drops and re-labels, in turn, by keyboard alone; what was decided, by index."""
    total = page.run("Number(document.getElementById('progress').textContent.split(' ')[2])")
    wanted = {}
    page.press("ArrowRight")
    for turn in range(total):
        # It goes on to the next by itself, which is on another page where this one ends.
        page.wait(f"document.activeElement.matches('.card') && !{list(wanted)}.includes(Number({FOCUSED}))")
        index = int(page.run(FOCUSED))
        wanted[index] = ("keep", "drop", "relabel")[turn % 3]
        # Classes without names are called by their digit.
        page.press({"keep": "k", "drop": "d"}.get(wanted[index], str((int(label[index]) + 1) % 4)))
    return wanted


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
def test_a_fit_goes_by_what_was_decided_in_the_report(browser, tmp_path):
    before, _ = a_fit(tmp_path / "first")
    browser.open(tmp_path / "first" / "report.html")
    browser.run("localStorage.clear()")
    browser.reload()
    wanted = decide_all(browser, before.label)
    assert len(wanted) == 50
    assert progress(browser) == "50 of 50 decided"
    file, _ = downloaded(browser, tmp_path, press_download)
    assert browser.complaints() == []

    after, draw = a_fit(tmp_path / "second", review=file)
    decisions = after.decisions()
    assert {index: decisions[index] for index in wanted} == wanted
    moved = [index for index, word in wanted.items() if word == "relabel"]
    assert draw.new_label[moved].equal((before.label[moved] + 1) % 4)
    assert not {index for index, word in wanted.items() if word == "drop"} & set(draw.index.tolist())
