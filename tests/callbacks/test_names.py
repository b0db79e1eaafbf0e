"""Names of classes and of files follow a partition into its tables, the log, checkpoints and files."""

import csv
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Subset

from lightning_unlearn import AttributionPartitionCallback, Partition, UnlearnReport
from lightning_unlearn.results.exports import to_dataframe
from lightning_unlearn.results.finding import finding_of
from tests.callbacks.published import make_partition
from tests.toys import Blobs, Toy

NAMES = ["ant", "bee", "cat", "dog"]


class Folder(Blobs):
    """As an ImageFolder."""

    classes = NAMES

    @property
    def samples(self):
        return [(f"{NAMES[y]}/{i}.png", y) for i, y in enumerate(self.y.tolist())]


def fit(partition, *more, epochs=6, **arguments):
    L.seed_everything(0)
    part = Subset(Folder(), list(range(202, -1, -1)))
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[partition, *more],
    )
    trainer.fit(Toy(), DataLoader(part, 16, shuffle=True), **arguments)


def rows_of(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_name_classes_and_files_of_a_subset_also_after_a_fit_goes_on(tmp_path, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    partition = AttributionPartitionCallback(at_epoch=4, every_n_epochs=1)
    fit(partition, ModelCheckpoint(tmp_path, filename="last"))
    resumed = AttributionPartitionCallback(at_epoch=4, every_n_epochs=1)
    fit(resumed, epochs=7, ckpt_path=tmp_path / "last.ckpt")
    for found in (partition.partition, resumed.partition):
        found.to_csv(tmp_path / "suspects.csv")
        rows = rows_of(tmp_path / "suspects.csv")
        assert len(rows) == len(found.suspect_indices()) > 20
        for row in rows:
            assert row["file"] == f"{row['given_class']}/{202 - int(row['index'])}.png"
            assert row["suggested_class"] == NAMES[int(row["suggested_label"])]
    frame = pytest.importorskip("pandas") and to_dataframe(partition.partition)
    assert frame["file"][0] == f"{frame['given_class'][0]}/202.png"
    # What is written keeps the names of the classes and files; a checkpoint the names alone.
    partition.partition.save(tmp_path / "partition.npz")
    loaded = Partition.load(tmp_path / "partition.npz")
    assert loaded.class_names == tuple(NAMES)
    assert loaded.files == partition.partition.files
    assert len(loaded.files) == 203
    assert b".png" not in (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match="files must be 203 paths, one for each sample, or none, but is"):
        replace(loaded, files=["a.png"])


def test_names_that_a_report_was_told_are_those_of_the_partition(tmp_path):
    partition = AttributionPartitionCallback(at_epoch=4)
    fit(partition, UnlearnReport(tmp_path / "out", class_names=["a", "b", "c", "d"]))
    assert partition.partition.class_names == ("a", "b", "c", "d")


def test_names_of_its_own_are_used_and_others_may_be_given(tmp_path):
    label = torch.tensor([0, 1, 2, 3])
    plain = make_partition(torch.tensor([0.9, 0.8, 0.2, 0.1]), label)
    named = replace(
        plain, class_names=NAMES, noise_rate=0.5, noise_rate_interval=(0.4, 0.6), often_called=((2, 3, 0.4),)
    )
    assert named.class_names == tuple(NAMES)
    assert "'cat' is often labeled 'dog' (40%)" in finding_of(named)
    named.remember_files(["0.png", "1.png", "2.png", "3.png"])
    named.to_csv(tmp_path / "own.csv")
    assert [(row["file"], row["given_class"]) for row in rows_of(tmp_path / "own.csv")] == [
        ("3.png", "dog"),
        ("2.png", "cat"),
    ]
    named.to_csv(tmp_path / "given.csv", class_names=["p", "q", "r", "s"])
    assert [row["given_class"] for row in rows_of(tmp_path / "given.csv")] == ["s", "r"]
    plain.to_csv(tmp_path / "plain.csv")
    assert not {"file", "given_class"} & set(rows_of(tmp_path / "plain.csv")[0])
    with pytest.raises(ValueError, match="Expected a file for each of 4 samples, but got 1"):
        plain.remember_files(["0.png"])
    with pytest.raises(ValueError, match="class_names"):
        replace(plain, class_names="abcd")
