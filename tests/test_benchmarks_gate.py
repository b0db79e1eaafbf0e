import json
from dataclasses import replace

import pytest

from benchmarks import gate
from benchmarks.gate import FAMILIES, judged, table


@pytest.fixture(scope="module")
def rows():
    fit = replace(next(FAMILIES["wine"]()), judged_after=(5, 20))
    return [row for rate in (0.0, 0.3) for row in judged(fit, rate)]


def test_a_fit_is_judged_after_each_of_the_epochs(rows):
    assert [(row["rate"], row["epoch"]) for row in rows] == [(0.0, 5), (0.0, 20), (0.3, 5), (0.3, 20)]
    assert [row["opened"] for row in rows] == [False, False, True, True]
    assert all(row["auroc"] is None for row in rows[:2])
    assert all(row["auroc"] > 0.95 and row["precision"] > 0.8 and row["recall"] > 0.6 for row in rows[2:])
    assert rows[2]["memorised"] < rows[3]["memorised"]


def test_the_table_has_a_line_for_every_rate(rows):
    _, _, clean, noisy = table(rows).strip().split("\n")
    assert clean.startswith("| wine | 0% | 2 | 0 |  |  |")
    assert noisy.startswith("| wine | 30% | 2 | 2 |")


def test_families_have_what_they_are_named_for():
    fits = {name: list(make()) for name, make in FAMILIES.items()}
    assert {name: len(of) for name, of in fits.items()} == {"digits": 6, "wine": 3, "breast cancer": 3, "drawn": 36}
    for fit in (fit for of in fits.values() for fit in of):
        assert len(fit.x) == len(fit.true_label)
        assert fit.true_label.max() == fit.num_classes - 1
        assert fit.network()(fit.x[:2]).shape == (2, fit.num_classes)


def test_the_command_writes_table_and_numbers(rows, tmp_path, monkeypatch, capsys):
    fit = replace(next(FAMILIES["wine"]()), judged_after=(5,))
    monkeypatch.setattr(gate, "FAMILIES", {"wine": lambda: iter([fit])})
    gate.main(["--families", "wine", "--rates", "0.3", "--write", str(tmp_path / "gate.md")])
    line = "| wine | 30% | 1 | 1 |"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "gate.md").read_text()
    (row,) = json.loads((tmp_path / "gate.json").read_text())
    assert {name: row[name] for name in rows[2]} == rows[2]
