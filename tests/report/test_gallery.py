"""Samples with the same input, or nearly the same picture, beside those that a report shows."""

import base64
import io

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn import AttributionPartitionCallback, UnlearnReport
from lightning_unlearn.cli import main
from lightning_unlearn.partitioning.apply_recipe import hashes_of_inputs
from lightning_unlearn.partitioning.label_scores import ShardResult
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.report import RunRecord
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
SIZE = 120
# Of the first twelve, under another label: four that are the same, four nearly, four in another size of bytes.
COPIES = 12


class Pictures(Dataset):
    """Smooth pictures of two classes; the last twelve are copies of the first, under the other label."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        small = torch.rand(SIZE, 3, 5, 5, generator=generator)
        small[:, 0, 0, 0] = torch.arange(SIZE) % 2
        self.x = interpolate(small, (16, 16), mode="bilinear")
        self.y = torch.arange(SIZE) % 2
        self.x[-COPIES:], self.y[-COPIES:] = self.x[:COPIES], 1 - self.y[:COPIES]
        self.x[-8:] += 0.02 * torch.randn(8, 3, 16, 16, generator=generator)

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Pictures(), 16, shuffle=True)


def all_suspect(evidence, reduce):
    """The copies are suspect, and those that they are of."""
    place = torch.minimum(evidence.index, SIZE - 1 - evidence.index)
    return torch.where(place < COPIES, 0.1 + place / 100, 0.9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    L.seed_everything(0)
    callbacks = [AttributionPartitionCallback(at_epoch=1, recipe=all_suspect), UnlearnReport(folder, samples=200)]
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=2, callbacks=callbacks, **options).fit(Net(), datamodule=Data())
    return folder


def pairs(record):
    return {
        (index, one["index"]): one["exact"]
        for index, card in record.gallery.items()
        for one in card.get("duplicates", [])
    }


def test_each_copy_is_beside_what_it_is_of(run):
    wanted = {}
    for index in range(COPIES):
        is_exact = index < COPIES - 8
        wanted |= {(index, SIZE - COPIES + index): is_exact, (SIZE - COPIES + index, index): is_exact}
    assert pairs(RunRecord.load(run)) == wanted


def test_afterwards_fewer_are_read_and_copies_that_have_no_card_have_a_picture(run, tmp_path, monkeypatch):
    record = RunRecord.load(run)
    record.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("trainer:\n  max_epochs: 2\n", encoding="utf-8")
    names = ["--model", f"{__name__}.Net", "--data", f"{__name__}.Data"]
    main(["report", str(tmp_path), "--samples", "8", "--config", "run.yaml", *names])
    again = RunRecord.load(tmp_path)
    assert len(again.gallery) == 8
    others = [one for card in again.gallery.values() for one in card["duplicates"]]
    data = Pictures()
    for one in others:
        assert ("src" in one) == (not one["exact"] and one["index"] not in again.gallery)
        if "src" in one:
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["src"].partition(",")[2]))))
            assert np.abs(picture / 255 - data.x[one["index"]].permute(1, 2, 0).clamp(0, 1).numpy()).mean() < 0.05
    assert sum("src" in one for one in others) > 0


def test_a_folder_of_before_says_nothing_of_duplicates(run, tmp_path):
    record = RunRecord.load(run)
    record.save(tmp_path)
    (tmp_path / "inputs.npz").unlink()
    assert RunRecord.load(tmp_path).inputs is None


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_put_their_hashes_together(ranks):
    generator = torch.Generator().manual_seed(0)
    identity = torch.randint(-(2**62), 2**62, (20,), generator=generator)
    perceptual = torch.randint(-127, 128, (20, 64), generator=generator).to(torch.int8)

    def work(rank, reduce):
        index = torch.arange(rank, 21, ranks) % 20
        weight = (torch.arange(rank, 21, ranks) < 20).float()
        of_none = {"basis": torch.zeros(2, 1), "attribution": torch.zeros(len(index), 1, 1)}
        names = ("margin", "aum", "label_confidence", "uncertainty", "loss")
        label = torch.zeros(len(index), dtype=torch.int64)
        evidence = Evidence(
            index=index, weight=weight, label=label, prediction=label, **of_none, **dict.fromkeys(names, weight)
        )
        # Three rows of each sample, as of three labels.
        share = {
            "identity": identity[index].repeat_interleave(3),
            "perceptual": perceptual[index],
        }
        return hashes_of_inputs(share, ShardResult(evidence, weight, None), 20, reduce)

    for found in run_ranks(work, ranks):
        assert found.identity.equal(identity)
        assert found.perceptual.equal(perceptual)
