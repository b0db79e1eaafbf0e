import json

import pytest

# The sdist has the tests, but not the benchmarks.
pytest.importorskip("benchmarks", reason="not a checkout")
from benchmarks import speed


def test_the_command_measures_steps_and_share(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "NETWORKS", {"tiny": (speed.DigitsClassifier, 1, 8, 300)})
    files = [tmp_path / "speed.md", tmp_path / "speed.json"]
    asked = ["--only", "steps", "share", "--repeats", "1", "--batch", "50"]
    speed.main([*asked, "--write", str(files[0]), "--json", str(files[1])])
    assert files[0].read_text().strip() == capsys.readouterr().out.strip()
    found = json.loads(files[1].read_text())
    (row,) = found["steps"]
    assert row["ratio"]["plain"] == 1
    assert row["ratio"]["idle"] == row["all"]["idle"][0] / row["all"]["plain"][0]
    (row,) = found["share"]
    assert 0 < row["partition"] + row["prune"] < row["fit"]


class Counts(speed.L.Callback):
    """How many rows the partition callback has gathered by the end of an epoch."""

    def __init__(self, partition):
        self.partition, self.rows = partition, None

    def on_train_epoch_end(self, trainer, pl_module):
        held = self.partition.state_dict()["trajectory"]
        self.rows = 0 if held is None else int(held["scores"][:, 0].sum())


def test_what_waits_gathers_nothing_and_what_gathers_does():
    x, y = speed.images(200, 8, 1)
    loader = speed.DataLoader(speed.Rows(x, y), 100, collate_fn=speed.as_it_is)
    for way, expected in (("idle", 0), ("evidence", 400)):
        callbacks = speed.WAYS[way]()
        counts = Counts(callbacks[0])
        speed.trainer_of(100, [*callbacks, speed.StopAfter(2), counts], "cpu").fit(speed.DigitsClassifier(), loader)
        assert counts.rows == expected
