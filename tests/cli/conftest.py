"""A team's folder, in which the command is run."""

import sys

import pytest

TEAM_MODULE = '''
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class TeamModel(L.LightningModule):
    """A small network.

    Args:
        width: of the hidden layer, in neurons.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU())
        self.out = torch.nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Needy(TeamModel):
    def __init__(self, width: int, name: str, rates: "tuple[float, ...]" = (1e-5, 0.5), act=torch.nn.ReLU()) -> None:
        super().__init__(width)


class Broken(TeamModel):
    def __init__(self) -> None:
        raise RuntimeError("no weights here")


class Folder(TensorDataset):
    """As torchvision's ImageFolder."""

    classes = ["low", "high"]

    @property
    def samples(self):
        return [(f"{self.classes[y]}/{i}.png", y) for i, y in enumerate(self.tensors[1].tolist())]


class TeamData(L.LightningDataModule):
    kind = TensorDataset

    def train_dataloader(self):
        x = torch.randn(201, 8, generator=torch.Generator().manual_seed(0))
        y = torch.arange(201) % 2
        x[:, 0] += 6 * y - 3
        y[:40] = 1 - y[:40]
        return DataLoader(self.kind(x, y), batch_size=16, shuffle=True)


class TeamFolder(TeamData):
    kind = Folder


class Validating(TeamModel):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


class Validated(TeamData):
    def val_dataloader(self):
        x = torch.randn(101, 8, generator=torch.Generator().manual_seed(1))
        y = torch.arange(101) % 2
        x[:, 0] += 6 * y - 3
        y[:20] = 1 - y[:20]
        return DataLoader(self.kind(x, y), batch_size=16)


class StopEarly(L.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch >= self.epoch


def number() -> int:
    return 3
'''
RUN = """
seed_everything: 0
model: {class_path: team.TeamModel, init_args: {width: 16}}
data: {class_path: team.TeamData}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 6
  logger: false
  enable_checkpointing: true
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: saved, filename: "{epoch}", save_top_k: -1}
"""


def enter(folder, patch):
    """Goes into a team's folder as a new process would, which has not imported the team's module yet."""
    (folder / "team.py").write_text(TEAM_MODULE)
    patch.chdir(folder)
    patch.setattr(sys, "path", list(sys.path))
    patch.setattr(sys, "argv", ["lightning-unlearn"])
    patch.delitem(sys.modules, "team", raising=False)


@pytest.fixture
def team(tmp_path, monkeypatch):
    """The folder of a team that knows nothing of the package, with a run.yaml."""
    enter(tmp_path, monkeypatch)
    (tmp_path / "run.yaml").write_text(RUN)
    yield tmp_path
    sys.modules.pop("team", None)
