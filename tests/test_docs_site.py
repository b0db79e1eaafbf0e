"""The documentation: its API is whole, its links lead somewhere, its code is run (by conftest.py) or says why not."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Modules that users import classes from; their functions are the package's own.
CLASSES = ("results.class_summary", "results.mask", "results.partition", "results.summary", "recipes.evidence")
# Rooms that users import from. The others are the package's own.
ROOMS = ("", "demo", "results.exports", "functional", "noise", "recipes", "report", "shrinking", *CLASSES)


def public_names(room):
    module = importlib.import_module(f"lightning_unlearn.{room}".rstrip("."))
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    ]
    if room in CLASSES:
        names = [name for name in names if isinstance(getattr(module, name), type)]
    return {name for name in names if not name.startswith("_")}


def documented_names():
    found = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        module = ""
        for kind, target, rest in re.findall(
            r"^\.\. (\w+(?::\w+)?):: ([\w.]+)\n((?: {3}.*\n)*)", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            if kind in ("currentmodule", "automodule"):
                module = target
            if kind == "automodule":
                listed = re.search(r":members:(.*)", rest).group(1).replace(",", " ").split()
                found |= set(listed) or public_names(target.removeprefix("lightning_unlearn").lstrip("."))
            elif kind != "currentmodule":
                found.add(target.rpartition(".")[2])
        assert module or page.name == "index.md", page
    return found


DOCUMENTED = documented_names()


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_on_a_page_of_the_api(room):
    assert public_names(room) <= DOCUMENTED


PAGES = {path.name: path.read_text(encoding="utf-8") for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]}
# What conftest.py runs or checks, and what is no code.
RUN, SHOWN = {"python", "yaml", "sh"}, {"text"}
NOT_RUN = {("multi-gpu.md", "needs four GPUs")}


def test_every_block_is_of_a_kind_that_is_run():
    for page, text in PAGES.items():
        fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
        kinds = {kind for kind in fences[::2] if not kind.startswith("{")}
        assert kinds <= RUN | SHOWN, page
        assert set(fences[1::2]) <= {""}, page


def test_what_is_not_run_says_why():
    skipped = {(page, why) for page, text in PAGES.items() for why in re.findall(r"<!-- skip: \w+ ?(.*) -->", text)}
    assert skipped == {(page, f'"{why}"') for page, why in NOT_RUN}


def anchors(text):
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    repository = "https://github.com/lightning-unlearn/lightning-unlearn/blob/main/"
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = ROOT / path.removeprefix(repository) if link.startswith(repository) else folder / (path or page)
        if (link.startswith(repository) or not link.startswith("https://")) and not (
            target.exists() and (not anchor or anchor in anchors(target.read_text(encoding="utf-8")))
        ):
            yield link


def test_links_lead_somewhere():
    dead = {page: links for page in PAGES if (links := list(dead_links(page)))}
    assert not dead


def test_the_figures_are_made_as_they_are_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--only", "diagrams", "--epochs", "4", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "docs" / "figures.py"), run_name="__main__")
    committed = {path.name for path in (ROOT / "docs" / "_static").glob("*.svg")}
    assert {path.name for path in tmp_path.iterdir()} == committed
    assert all((ROOT / "docs" / "_static" / name).stat().st_size < 100_000 for name in committed)
