import json

import pytest
import torch

# The sdist has the tests, but not the benchmarks.
pytest.importorskip("benchmarks", reason="not a checkout")
from benchmarks import scaling
from benchmarks.rank_memory import of_memory
from benchmarks.scaling_tables import slope, tables
from benchmarks.simulated import SimulatedRanks
from benchmarks.synthetic import evidence, share_of
from lightning_unlearn.recipes import RECIPES, Recipe


def test_simulated_ranks_add_up_and_a_rank_that_goes_astray_stops_all():
    ranks = SimulatedRanks(5)
    found = ranks.run(lambda rank: (ranks.reduce(torch.tensor([rank, 1])), ranks.reduce(torch.ones(2, 2)).sum()))
    assert all(first.tolist() == [10, 5] and second == 20 for first, second in found)
    assert (ranks.collectives, ranks.bytes) == (2, 32)
    with pytest.raises(RuntimeError, match=r"ranks failed") as raised:
        SimulatedRanks(3).run(lambda rank: 1 / rank)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    ranks = SimulatedRanks(2)
    with pytest.raises(RuntimeError, match="2 of 2 ranks failed"):
        ranks.run(lambda rank: ranks.reduce(torch.zeros(rank + 1)))


def test_the_shares_are_the_whole():
    whole = evidence(103, 4)
    shares = [share_of(whole, rank, 5) for rank in range(5)]
    counted = torch.cat([share.index[share.weight > 0] for share in shares])
    assert counted.sort().values.equal(whole.index)
    assert all(share.margin.equal(whole.margin[share.index]) for share in shares)
    assert 0.1 < (whole.prediction != whole.label).float().mean() < 0.5


@pytest.mark.parametrize("recipe", ["auto", "loss"])
def test_seven_simulated_ranks_come_to_what_one_does(recipe):
    found = scaling.simulate(7, 1000, 4, recipe)
    assert scaling.agrees(found)
    assert 100 < found["suspects"] < 400
    assert found["collectives"] > 10
    assert found["bytes summed per rank"] > 1000 * 4


def test_a_recipe_that_forgets_to_add_up_is_seen(monkeypatch):
    def forgets(share, reduce):
        return RECIPES["loss"].function(share, lambda part: part)

    monkeypatch.setitem(RECIPES, "forgets", Recipe("forgets", forgets))
    assert not scaling.agrees(scaling.simulate(7, 1000, 4, "forgets"))


def test_the_command_simulates_and_measures(capsys, tmp_path, monkeypatch):
    # The processes of their own are for peak memory.
    monkeypatch.setattr(scaling, "in_a_process", lambda work, *arguments: work(*arguments))
    scaling.main(["--simulate", "3", "--samples", "500", "--classes", "3"])
    assert "| 3 | 500 | 3 |" in capsys.readouterr().out
    sizes = ["--samples", "300", "600", "--classes", "3", "80", "--neurons", "4", "8"]
    files = [tmp_path / name for name in ("t.md", "t.json", "t.png")]
    scaling.main(
        ["--only", "samples", "classes", "neurons", *sizes]
        + [text for pair in zip(("--write", "--json", "--figure"), map(str, files), strict=True) for text in pair]
    )
    shown = capsys.readouterr().out
    assert "Exponents between the two largest: observe" in shown
    assert files[0].read_text().strip() == shown.strip()
    found = json.loads(files[1].read_text())
    # As TrainingDynamics's docstring says, and a few bytes for all samples together.
    assert [row["state_bytes"] for row in found["samples"]] == pytest.approx([20 * 2 + 56] * 2, abs=0.1)
    assert [row["state_bytes"] for row in found["classes"]] == pytest.approx([20 * 2 + 56, 20 * 79 + 56], abs=0.1)
    assert [row["neurons"] for row in found["neurons"]] == [4, 8]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_fits_with_the_callbacks_and_without_and_rounds_are_measured(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "in_a_process", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr("benchmarks.scaling_fits._IN_ROUNDS", 200)
    scaling.main(["--only", "fits", "rounds", "--in-fits", "300", "--rounds", "5"])
    shown = capsys.readouterr().out
    assert "| 300 | " in shown
    # After two epochs and each that follows, but the last.
    assert "### A partition after every epoch, 200 samples\n\n3 partitions in 5 epochs" in shown


def test_of_many_classes_the_drawn_evidence_is_judged_by_soft_margins():
    whole = evidence(2_000, 200)
    assert whole.soft_margins.shape == (2_000, 5, 9)
    assert whole.basis.shape == (200, 0)
    made = scaling.partition_of(whole, whole.label, scaling.no_reduce)
    assert made.noise_rate > 0.05


def test_what_a_rank_holds_is_measured_to_the_partition():
    class Sender:
        def send(self, found):
            self.found = found

    sender = Sender()
    of_memory(3_000, 4, rank=0, world_size=1, port=0, sender=sender)
    one = sender.found
    # As TrainingDynamics's docstring says, and whether anything was merged into its phases.
    assert one["evidence"] == (20 * 3 + 56) * 3_000 + 5
    # So little that what the system counts late is more.
    assert one["gathering"] <= one["judging"]
    two = {**one, "processes": 2, "evidence": one["evidence"] / 2}
    shown = tables({"memory": [one, two]})
    assert "| 1 | 116 (1.00) |" in shown
    assert "| 2 | 116 (1.00) |" in shown


def test_the_slope_is_an_exponent():
    rows = [{"n": 1, "s": 9.0}, {"n": 10, "s": 1.0}, {"n": 100, "s": 1000.0}]
    assert slope(rows, "s", "n") == pytest.approx(3)
