"""What is said of versions is what is installed and tested."""

import re
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
STATED = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
FLOORS = dict(re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line).groups() for line in STATED if ">=" in line)
REFERENCE = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))


def table():
    """Rows of the README: name, oldest version, reference version."""
    _, _, after = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Versions")
    rows = re.findall(r"^\| ([\w-]+).*? \| ([\d.]+) \| ([\d.]+) \|$", after.partition("\n## ")[0], re.M)
    return {name: (oldest, reference) for name, oldest, reference in rows}


def test_the_readme_states_what_the_package_asks_for():
    rows = table()
    assert rows.pop("Python")[0] == PROJECT["requires-python"].removeprefix(">=")
    assert len(rows) >= 8
    assert {name: oldest for name, (oldest, _) in rows.items()} == {name: FLOORS[name] for name in rows}
    assert {name: reference for name, (_, reference) in rows.items()} == {name: REFERENCE[name] for name in rows}
    assert [name for name in ("torch", "lightning", "captum", "torchmetrics") if name not in rows] == []


def test_the_oldest_set_holds_lightning_at_its_floor():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in ("lightning", "pytorch-lightning"):
        assert f" {name}=={FLOORS[name]}.0" in makefile


@pytest.mark.parametrize(
    ("tool", "environment"),
    # Into what it makes, uv writes a .gitignore itself.
    [(".gitignore", ".venv-oldest"), ("pyproject.toml", ".venv-oldest"), ("pyproject.toml", ".venv-newest")],
)
def test_the_other_environments_are_left_alone_by_tools(tool, environment):
    assert environment in (ROOT / tool).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
def test_releases_that_were_compromised_are_never_installed(name):
    (line,) = [line for line in STATED if re.match(rf"{name}[>=]", line)]
    assert line == f"{name}>={FLOORS[name]},!=2.6.2,!=2.6.3"
