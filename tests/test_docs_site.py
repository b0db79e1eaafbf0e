"""Every public name is on a page of the API; `make docs` itself renders the pages and follows their links."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms that users import from. The others are the package's own.
ROOMS = ("", "demo", "exports", "functional", "noise", "recipes", "report", "shrinking", "types")
# Users import classes from it; its functions and its protocols are the package's own.
TYPES = "types"


def public_names(room):
    module = importlib.import_module(f"lightning_unlearn.{room}".rstrip("."))
    names = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    ]
    if room == TYPES:
        names = [name for name in names if isinstance(getattr(module, name), type) and not name.endswith("Source")]
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
