"""A team that uses pytorch_lightning, whose imports are in alphabetical order: ours comes first. Run by test_packages.

Writes what it found as JSON to the file that its argument names.
"""

import copy
import inspect
import io
import json
import logging
import pickle
import sys
from pathlib import Path

import torch

import lightning_unlearn

EARLY = "lightning" in sys.modules  # before anybody has asked for a callback
from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, SensitivityPruneCallback  # noqa: E402
from lightning_unlearn.pruning.criteria import Sensitivity  # noqa: E402

EARLIEST = AttributionPartitionCallback(at_epoch=1)
NEVER_IMPORTED = "pytorch_lightning" not in sys.modules

import pytorch_lightning as pl  # noqa: E402
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar  # noqa: E402
from pytorch_lightning.cli import LightningCLI  # noqa: E402
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # noqa: E402
from torch.optim.lr_scheduler import StepLR  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402


class TeamModel(pl.LightningModule):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU())
        self.out = torch.nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithoutForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.out(batch[0]), batch[1])

    configure_optimizers = TeamModel.configure_optimizers


class TeamData(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.x = torch.randn(201, 8, generator=torch.Generator().manual_seed(0))
        self.y = torch.arange(201) % 2
        self.x[:, 0] += 6 * self.y - 3
        self.wrong = self.y.clone()
        self.wrong[:40] = 1 - self.wrong[:40]

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.wrong), batch_size=16)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.x[100:], self.y[100:]), batch_size=32)


QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_model_summary": False}
ARGUMENTS = {
    "partition": {"at_epoch": 5, "recipe": "label"},
    "prune": {"layer": "encoder.0", "amount": 0.25, "criterion": Sensitivity(fdr_level=None), "max_val_drop": None},
    "finetune": {"mode": "full", "lr": 1e-2},
}


def trio():
    return [
        CleanSubsetFinetuneCallback(**ARGUMENTS["finetune"], lr_scheduler=lambda optimizer: StepLR(optimizer, 1)),
        AttributionPartitionCallback(**ARGUMENTS["partition"]),
        SensitivityPruneCallback(**ARGUMENTS["prune"]),
    ]


def trainer(callbacks, **kwargs):
    arguments = QUIET | {"max_epochs": 8, "enable_checkpointing": False, "enable_progress_bar": False} | kwargs
    return pl.Trainer(callbacks=callbacks, **arguments)


def message(call, kind=Exception):
    try:
        call()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class Order(pl.Callback):
    """Notes which callbacks come before the progress bar."""

    def on_train_end(self, trainer, pl_module):
        names = [type(callback).__name__ for callback in trainer.callbacks]
        self.before_bar = names[: names.index("TQDMProgressBar")]


def fit():
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("pytorch_lightning").addHandler(handler)
    pl.seed_everything(0)
    callbacks, order = trio(), Order()
    keep = ModelCheckpoint("saved", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    model, data = TeamModel(), TeamData()
    bar = TQDMProgressBar(refresh_rate=0)
    fitted = trainer([bar, *callbacks, order, keep], enable_checkpointing=True, enable_progress_bar=True)
    fitted.fit(model, datamodule=data)
    logging.getLogger("pytorch_lightning").removeHandler(handler)
    _finetune, partition, prune = callbacks
    again, resumed = trio(), TeamModel()
    trainer(again).fit(resumed, datamodule=TeamData(), ckpt_path="saved/epoch=5.ckpt")
    return {
        "log": log.getvalue(),
        "before_bar": order.before_bar,
        "found": (~partition.partition.is_clean[:40]).float().mean().item(),
        "false alarms": (~partition.partition.is_clean[40:]).float().mean().item(),
        "pruned": prune.mask.pruned_indices().tolist(),
        "zero": model.encoder[0].weight[prune.mask.pruned_indices()].abs().sum().item(),
        "accuracy": fitted.callback_metrics["val_acc"].item(),
        "advice": partition.summary.advice,
        "lr": [group["lr"] for group in fitted.optimizers[0].param_groups],
        "loader": len(data.train_dataloader().dataset),
        "resumed partition": again[1].partition.clean_probability.equal(partition.partition.clean_probability),
        "resumed weights": max(
            (one - other).abs().max().item()
            for one, other in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
        ),
    }


def refused():
    two = trainer([AttributionPartitionCallback(at_epoch=1)], max_epochs=2)
    without = trainer([SensitivityPruneCallback()], max_epochs=2)
    return {
        "no forward": message(lambda: two.fit(WithoutForward(), datamodule=TeamData()), TypeError),
        "no partner": message(lambda: without.fit(TeamModel(), datamodule=TeamData()), MisconfigurationException),
    }


def written(arguments):
    """As in a file of settings, where a criterion is a class and its arguments."""
    criterion = {"class_path": "lightning_unlearn.pruning.criteria.Sensitivity", "init_args": {"fdr_level": None}}
    return arguments | {"criterion": criterion} if "criterion" in arguments else arguments


def cli():
    Path("run.yaml").write_text(
        json.dumps(
            {
                "seed_everything": 0,
                "trainer": QUIET
                | {
                    "max_epochs": 8,
                    "enable_checkpointing": False,
                    "enable_progress_bar": False,
                    "callbacks": [
                        {"class_path": f"lightning_unlearn.{name}", "init_args": written(ARGUMENTS[key])}
                        for name, key in {
                            "CleanSubsetFinetuneCallback": "finetune",
                            "AttributionPartitionCallback": "partition",
                            "SensitivityPruneCallback": "prune",
                        }.items()
                    ],
                },
            }
        )
    )
    sys.argv = ["script.py", "fit", "--config", "run.yaml", "--model.width", "16"]
    run = LightningCLI(TeamModel, TeamData, save_config_callback=None)
    names = {type(callback).__name__: callback for callback in run.trainer.callbacks}
    return {
        "found": (~names["AttributionPartitionCallback"].partition.is_clean[:40]).float().mean().item(),
        "pruned": len(names["SensitivityPruneCallback"].mask.pruned_indices()),
    }


def kinds():
    from lightning.pytorch import Callback

    made = trio()[1]
    copied = copy.deepcopy(made)
    loaded = pickle.loads(pickle.dumps(made))
    return {
        "theirs": [isinstance(each, pl.Callback) for each in (made, copied, loaded, EARLIEST)],
        "lightning's": [isinstance(each, Callback) for each in (made, copied, loaded, EARLIEST)],
        "signature": list(inspect.signature(AttributionPartitionCallback).parameters)[:1],
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    results = {
        # First, while no callback has been made since pytorch_lightning was imported.
        "cli": cli(),
        "lightning was imported early": EARLY,
        "pytorch_lightning was not imported by us": NEVER_IMPORTED,
        "kinds": kinds(),
        "fit": fit(),
        "refused": refused(),
        "names": [name for name in lightning_unlearn.__all__ if not hasattr(lightning_unlearn, name)],
    }
    target.write_text(json.dumps(results))
