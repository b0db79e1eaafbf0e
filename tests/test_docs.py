"""What docs/support.md says is shown by the tests that it names, and refused in the words that it quotes."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith(("| ---", "| what", "| complaint"))
]
TESTS = sorted({name for row in ROWS for name in re.findall(r"`([\w/]+\.py::\w+)`", row[-1])})
QUOTES = sorted({quote for row in ROWS for quote in re.findall(r'"([^"=]{12,})"', row[1])})


def literals():
    """Every text in the package, with blanks where something is filled in."""
    for path in (ROOT / "lightning_unlearn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


TEXT = "\n".join(literals())


def test_every_row_has_as_many_cells_and_a_test():
    assert len(ROWS) > 60
    for row in ROWS:
        assert len(row) == 3, row
        assert re.search(r"`[\w/]+\.py::test_\w+`", row[-1]), row
        assert row[1], row


@pytest.mark.parametrize("name", TESTS)
def test_a_test_that_is_named_exists(name):
    file, function = name.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("quote", QUOTES)
def test_words_that_are_quoted_are_in_the_package(quote):
    assert quote in TEXT


CONTRIBUTING = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
PLACES = sorted(set(re.findall(r"`(\w+/\w+\.py)`(?: \((`\w+`(?:, `\w+`)*)\))?", CONTRIBUTING)))


@pytest.mark.parametrize(("file", "names"), PLACES)
def test_what_the_guide_for_contributors_names_exists(file, names):
    path = next((root / file for root in (ROOT / "lightning_unlearn", ROOT) if (root / file).is_file()), None)
    assert path is not None, file
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+)`", names):
        assert re.search(rf"(def|class) {name}\b|^{name}\b", text, re.MULTILINE), (file, name)


MESSAGES = re.findall(
    r'^\| "([^"]+)"', (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_shown_so(message):
    assert len(MESSAGES) > 12
    assert message in TEXT
