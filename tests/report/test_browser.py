"""The page in a real browser, in which a person clicks."""

from dataclasses import replace

import pytest
import torch

from lightning_unlearn.report import RunRecord, write_report
from lightning_unlearn.results.duplicates import InputHashes
from lightning_unlearn.results.mask import NeuronMask
from tests.callbacks.published import make_partition
from tests.report.runs import BREAKING, NAMES, SUSPECTS, hostile_record

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
CARDS = "[...document.querySelectorAll('.card')]"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    record = hostile_record()
    sure = (torch.arange(100) * 7 % 41) / 41
    partition = replace(record.partition, suggested_probability=sure)
    sound = {"kind": "audio", "src": "data:audio/wav;base64,AAAA", "picture": f"data:image/png;base64,{PIXEL}"}
    kept = {"kind": "text", "text": "kept"}
    gallery = {**record.gallery, 3: {"kind": "image", "src": f"data:image/png;base64,{PIXEL}"}, 7: sound, 50: kept}
    record = replace(record, partition=partition, gallery=gallery)
    return write_report(record, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def page(browser, file):
    """The page as it opens; afterwards nothing may have gone wrong in it."""
    browser.open(file)
    yield browser
    assert browser.complaints() == []


def shown(page, name="index"):
    return page.run(f"{CARDS}.map(card => card.dataset.{name})")


def where(page):
    return page.run("document.getElementById('where').textContent")


def choose(page, control, text):
    """Picks an option of a select by its text, with keys, as the list of a headless browser cannot be clicked."""
    options = page.run(f"[...document.getElementById({control!r}).options].map(one => one.text)")
    (at,) = [at for at, option in enumerate(options) if option == text]
    before = page.run(f"document.getElementById({control!r}).selectedIndex")
    page.run(f"document.getElementById({control!r}).focus()")
    page.press("ArrowDown" if at > before else "ArrowUp", abs(at - before))
    page.wait(f"document.getElementById({control!r}).selectedIndex === {at}")
    # The page follows its address, whose change is told a moment later.
    page.run("new Promise(done => setTimeout(done, 30))")


def test_it_opens_at_the_most_suspect(page):
    # Of 0, 1 and 50 a person has decided already.
    assert shown(page) == [str(index) for index in range(2, 26)]
    assert where(page) == "1 to 24 of 41"
    assert page.run("[document.images.length, document.querySelectorAll('audio').length]") == [2, 1]
    assert page.run("[...document.images].every(image => image.naturalWidth === 1)")


def test_names_and_texts_of_the_data_are_no_markup(page):
    texts = page.run(f"{CARDS}.map(card => card.textContent)")
    assert any(f"given {NAMES[0]}" in text for text in texts)
    assert any(BREAKING in text for text in texts)
    assert page.run("document.scripts.length") == 2
    # What a policy stops is a complaint, which the end of every test looks for.
    assert page.run("document.querySelectorAll('[onerror], script[src]').length") == 0


def test_each_control_leaves_what_it_names(page):
    choose(page, "by-class", "bird (10)")
    assert set(shown(page, "given")) == {"3"}
    assert where(page) == "1 to 10 of 10"
    choose(page, "by-class", "all")
    choose(page, "by-reason", "input (10)")
    assert set(shown(page, "reason")) == {"input"}
    choose(page, "by-reason", "all")
    choose(page, "by-action", "re-labeled (10)")
    assert set(shown(page, "action")) == {"re-labeled"}
    texts = page.run(f"{CARDS}.map(card => card.textContent)")
    assert all(f"suggested {NAMES[1]}" in text and "re-labeled" in text for text in texts)
    choose(page, "by-who", "by a person (3)")
    assert shown(page) == ["0"]
    choose(page, "by-action", "all")
    assert shown(page) == ["0", "1", "50"]
    choose(page, "by-class", "bird (10)")
    assert where(page) == "no sample is like that"


def test_both_lists_are_told_apart(browser, tmp_path):
    clean = torch.tensor([0.9, 0.1, 0.52, 0.05, 0.45, 0.99])
    found = make_partition(clean, torch.arange(6) % 4)
    is_clean = clean > 0.2
    parts = {"is_clean": is_clean, "reason": (~is_clean).to(torch.uint8), "noise_rate_interval": (0.3, 0.5)}
    cards = {index: {"kind": "text", "text": "a"} for index in (1, 2, 3, 4)}
    record = RunRecord(replace(found, **parts), gallery=cards)
    browser.open(write_report(record, tmp_path / "report.html"))
    assert shown(browser) == ["3", "1", "4", "2"]
    choose(browser, "by-list", "worth a look (2)")
    assert shown(browser) == ["4", "2"]
    assert browser.run(f"{CARDS}.map(card => card.querySelector('.tag').textContent)") == ["worth a look"] * 2
    choose(browser, "by-list", "suspects (2)")
    assert shown(browser) == ["3", "1"]
    assert browser.complaints() == []


def test_near_duplicates_stand_beside_a_sample(browser, tmp_path):
    picture = {"kind": "image", "src": f"data:image/png;base64,{PIXEL}"}
    beside = {"index": 90, "exact": False, "src": picture["src"], "file": f"1/{BREAKING}.png"}
    gallery = {index: {**picture} for index in range(5)}
    gallery[1]["duplicates"] = [beside, {"index": 3, "exact": False}, {"index": 5, "exact": True}]
    gallery[2]["duplicates"] = [{"index": 6, "exact": True}]
    gallery[4] = {"kind": "text", "text": "a", "duplicates": [{"index": 8, "exact": True}]}
    record = hostile_record(gallery=gallery, inputs=InputHashes(torch.arange(100), torch.zeros(100, 64).to(torch.int8)))
    browser.open(write_report(record, tmp_path / "report.html"))
    assert "3 of these samples have near duplicates" in browser.run("document.querySelector('main').innerText")
    rows = f"{CARDS}.map(card => [...card.querySelectorAll('.duplicate')].map(one => one.innerText.split('\\n')[0]))"
    words = dict(zip(shown(browser), browser.run(rows), strict=True))
    assert words["1"] == ["near duplicate #90", "near duplicate #3", "same input #5"]
    assert (words["3"], words["4"]) == ([], ["same input #8"])
    pictures = "[...document.querySelectorAll('.card[data-index=\"1\"] .duplicate img')].map(one => one.naturalWidth)"
    assert browser.run(pictures) == [1, 1, 1]
    choose(browser, "by-duplicate", "another label (1)")
    assert shown(browser) == ["1"]
    choose(browser, "by-duplicate", "same label (2)")
    assert shown(browser) == ["2", "4"]
    choose(browser, "by-duplicate", "all")
    browser.click(".card[data-index='2'] .look img")
    tops = browser.run("[...document.querySelectorAll('dialog img')].map(one => one.getBoundingClientRect().top)")
    assert (len(tops), max(tops) - min(tops) < 2) == (2, True)
    assert browser.complaints() == []


@pytest.mark.parametrize(
    ("order", "first"),
    [
        ("least suspect first", ["50", "39", "38"]),
        ("given class", ["0", "4", "8"]),
        ("suggested class", ["3", "7", "11"]),
        ("dataset index", ["0", "1", "2"]),
        ("surest suggestion first", ["35", "29", "23"]),
    ],
)
def test_it_sorts(page, order, first):
    choose(page, "by-sort", order)
    assert shown(page)[:3] == first


def test_the_buttons_turn_pages_and_stop_at_the_ends(page):
    assert page.run("document.getElementById('before').disabled")
    page.click("#after")
    page.wait("document.getElementById('where').textContent === '25 to 41 of 41'")
    assert shown(page) == [*(str(index) for index in range(26, SUSPECTS)), "0", "1", "50"]
    assert page.run("document.getElementById('after').disabled")
    page.click("#before")
    page.wait("document.getElementById('where').textContent === '1 to 24 of 41'")
    choose(page, "by-size", "12")
    page.click("#after")
    page.wait("document.getElementById('where').textContent === '13 to 24 of 41'")
    # Another order begins at its first page.
    choose(page, "by-sort", "dataset index")
    assert where(page) == "1 to 12 of 41"


def test_all_of_it_can_be_done_with_the_keyboard(page):
    reached = []
    page.run("document.body.focus()")
    for _ in range(14):
        page.press("Tab")
        reached.append(page.run("document.activeElement.id"))
    assert [name for name in reached if name][:13] == [
        *("by-list", "by-class", "by-suggested", "by-pair", "by-reason", "by-action", "by-who", "by-decided"),
        *("by-text", "by-sort", "by-size", "to-page", "after"),
    ]
    page.run("document.getElementById('after').focus()")
    page.press("Enter")
    page.wait("document.getElementById('where').textContent.startsWith('25 to')")
    # At the end its button goes dead, and the focus must not be lost with it.
    assert page.run("document.activeElement.id") == "before"
    page.press(" ")
    page.wait("document.getElementById('where').textContent.startsWith('1 to')")


def test_controls_have_names_and_pictures_texts(page):
    controls = "[...document.querySelectorAll('.controls select, .controls input')]"
    labels = page.run(f"{controls}.map(one => one.labels[0]?.firstChild.textContent.trim() ?? '')")
    assert labels == [
        *("list", "given class", "suggested class", "given \u2192 suggested", "near duplicate", "reason"),
        *("what was done", "decided by", "your decision", "index or file", "order", "on a page", "page"),
    ]
    assert page.run("[...document.querySelectorAll('.card select')].every(one => one.getAttribute('aria-label'))")
    assert page.run("[...document.images].every(image => image.alt)")
    assert page.run("[...document.querySelectorAll('svg[role=img]')].every(one => one.getAttribute('aria-label'))")
    # Who cannot see it hears how many there are.
    assert page.run("document.getElementById('where').getAttribute('aria-live')") == "polite"


@pytest.mark.parametrize(
    "state", ["class=99x&sort=toString&size=-3&page=1e9", "class=%ff&action=&who=&reason=__proto__"]
)
def test_an_address_of_nonsense_is_survived(browser, file, state):
    browser.open(file, state)
    assert browser.complaints() == []
    assert where(browser) == "no sample is like that"


def test_a_link_keeps_the_view(browser, file):
    browser.open(file, "class=3&reason=label&sort=-p&size=6&page=1")
    assert shown(browser) == ["39", "35", "31", "27", "23", "19"]
    assert browser.complaints() == []


# Words on paper, by WCAG 2: 4.5 to 1.
CONTRAST = """(() => {
  const light = (text) => {
    const part = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * part[0] + .7152 * part[1] + .0722 * part[2];
  };
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  const texts = "h1, p, b, td, th, label, span, summary, .facts, .tag, select, button, footer, svg text";
  for (const one of document.querySelectorAll(texts)) {
    if (!one.textContent.trim() || one.classList.contains("on-heat") || one.closest(":disabled")) continue;
    const style = getComputedStyle(one), color = one.closest("svg") ? style.fill : style.color;
    const pair = [light(color), light(ground(one))].sort((a, b) => b - a);
    const ratio = (pair[0] + .05) / (pair[1] + .05);
    if (ratio < 4.5) found.push([one.className?.baseVal ?? one.className, one.textContent.slice(0, 20), ratio]);
  }
  return found;
})()"""


@pytest.mark.parametrize(
    "look", [{"scheme": "light"}, {"scheme": "dark"}, {"scheme": "dark", "media": "print"}], ids=str
)
def test_words_stand_out_from_their_ground(page, look):
    page.emulate(**look)
    assert page.run(CONTRAST) == []


LONG = [
    "Northern saw-whet owl (juvenile, captive)",
    "Supercalifragilisticexpialidocious" * 3,
    "\u7c73\u56fd\u306e\u30aa\u30aa\u30ab\u30df" * 4,
    "\u0630\u0626\u0628 \u0631\u0645\u0627\u062f\u064a \u0643\u0628\u064a\u0631 \u062c\u062f\u0627",
]
# Of every text of a drawing, what of it lies outside.
CUT_OFF = """[...document.querySelectorAll("svg text")].filter((one) => {
  const text = one.getBoundingClientRect(), box = one.closest("svg").getBoundingClientRect();
  const [left, right] = [box.left - text.left, text.right - box.right];
  return Math.max(left, right, box.top - text.top, text.bottom - box.bottom) > 1;
}).map((one) => one.textContent)"""


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """Names that need room, in a report with more neurons than are drawn, and a swap at its very end."""
    record = hostile_record(class_names=LONG)
    label = record.partition.label
    matrix = torch.full((4, 4), 0.25)
    neurons = torch.linspace(-1, 1, 12_345)
    mask = NeuronMask("backbone.layer4." * 20, neurons > -0.9, neurons, torch.full((12_345,), 0.1))
    curves = {f"val/{'a_metric_' * 12}{kind}": [[0, 1.0], [9, 0.5]] for kind in ("loss", "acc")}
    partition = replace(record.partition, noise_matrix=matrix, suggested_label=(label + 1) % 4)
    record = replace(record, partition=partition, masks=(mask,), curves=curves, swaps=[9])
    return write_report(record, tmp_path_factory.mktemp("long") / "report.html")


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_cut_off_or_wider_than_the_screen(browser, file, long_names, width):
    for one in (file, long_names):
        browser.open(one)
        browser.emulate(width=width)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run(CUT_OFF) == []


def test_a_name_from_right_to_left_does_not_turn_the_number_behind_it(browser, long_names):
    browser.open(long_names, "class=2")
    # The suggested name is the Arabic one: the bracket stands to the right of all of it.
    assert browser.run(
        """(() => {
          const name = document.querySelector(".card .suggested"), range = document.createRange();
          range.selectNode(name.nextSibling);
          const bracket = [...range.getClientRects()].pop(), line = [...name.getClientRects()].pop();
          return bracket.left >= line.right - 1 || bracket.top >= line.bottom - 1;
        })()"""
    )


def test_what_is_folded_is_printed(page):
    page.emulate(media="print")
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("[...document.querySelectorAll('details')].every(one => one.open)")
    assert page.run("getComputedStyle(document.querySelector('.controls')).display") == "none"
    page.run("dispatchEvent(new Event('afterprint'))")
    assert not page.run("[...document.querySelectorAll('details')].some(one => one.open)")


def test_a_hundred_thousand_samples_are_turned_at_once(browser, tmp_path):
    size = 100_000
    cards = {index: {"kind": "text", "text": "x"} for index in range(SUSPECTS)}
    browser.open(write_report(hostile_record(size, gallery=cards), tmp_path / "large.html"))
    started = browser.run("performance.now()")
    choose(browser, "by-sort", "least suspect first")
    assert shown(browser)[0] == "39"
    assert browser.run("performance.now()") - started < 5000
    assert browser.complaints() == []
