"""What docs/support.md says is shown by the tests that it names, and refused in the words that it quotes."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith(("| ---", "| what", "| complaint"))
]
TESTS = sorted({name for row in ROWS for name in re.findall(r"`([\w/]+\.py::\w+)`", row[-1])})
QUOTES = sorted({quote for row in ROWS for quote in re.findall(r'"([^"=]{12,})"', row[1])})


@functools.cache
def text():
    """Every text in the package, with blanks where something is filled in."""
    return "\n".join(literals())


def literals():
    for path in (ROOT / "lightning_unlearn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@functools.cache
def functions_of(file):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_has_as_many_cells_and_a_test():
    assert len(ROWS) > 60
    for row in ROWS:
        assert len(row) == 3, row
        assert re.search(r"`[\w/]+\.py::test_\w+`", row[-1]), row
        assert row[1], row


def test_every_test_that_is_named_exists():
    assert len(TESTS) > 300
    missing = [name for name in TESTS if name.partition("::")[2] not in functions_of(name.partition("::")[0])]
    assert not missing


def test_words_that_are_quoted_are_in_the_package():
    assert len(QUOTES) > 100
    missing = [quote for quote in QUOTES if quote not in text()]
    assert not missing


CONTRIBUTING = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
PLACES = sorted(set(re.findall(r"`(\w+/\w+\.py)`(?: \((`\w+`(?:, `\w+`)*)\))?", CONTRIBUTING)))


def test_what_the_guide_for_contributors_names_exists():
    assert len(PLACES) > 30
    for file, names in PLACES:
        path = next((root / file for root in (ROOT / "lightning_unlearn", ROOT) if (root / file).is_file()), None)
        assert path is not None, file
        source = path.read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b|^{name}\b", source, re.MULTILINE), (file, name)


MESSAGES = re.findall(
    r'^\| "([^"]+)"', (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
)


def test_a_message_that_is_explained_is_shown_so():
    assert len(MESSAGES) > 12
    missing = [message for message in MESSAGES if message not in text()]
    assert not missing
