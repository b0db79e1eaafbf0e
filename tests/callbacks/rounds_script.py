"""What test_rounds_ddp.py runs in processes of its own, one for each rank."""

from dataclasses import asdict

import torch
from torch.utils.data import DataLoader

from lightning_unlearn import CleanSubsetFinetuneCallback
from tests.callbacks.published import Published, make_partition
from tests.toys import Blobs, BlobsData, Toy, adamw, finetune_callback, fit, partition_callback, trio, weights

SIZE, AT, EPOCHS = 101, 2, 6
SETTINGS = {
    "relabel": {"on_noisy": "relabel", "relabel_threshold": 0.4},
    "reweight": {"on_noisy": "reweight", "lr": 0.01},
    "report": {"on_noisy": "relabel"},
}


def plain():
    """No batch norm, whose statistics are each rank's own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.nn.Sequential(
            torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4)
        )


def unsure(evidence):
    """Probabilities between 0 and 1 that change from round to round."""
    return (evidence.margin / 4).sigmoid()


class Notes(Toy):
    """The dataset index and the label of every row that a training step gets, by epoch."""

    def __init__(self, data):
        super().__init__(plain, adamw)
        self.known = {row.numpy().tobytes(): index for index, row in enumerate(data.x)}
        self.noted = {}

    def training_step(self, batch):
        rows = self.noted.setdefault(self.current_epoch, [])
        rows += [(self.known[x.numpy().tobytes()], y.item()) for x, y in zip(*batch, strict=True)]
        return super().training_step(batch)


class Draws(CleanSubsetFinetuneCallback):
    """Keeps what was to be drawn in each epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 and self.is_active:
            self.draws = {**getattr(self, "draws", {}), trainer.current_epoch: self.training_subset.state_dict()}


def save(folder, scenario, trainer, module, **what):
    found = {"noted": module.noted, "weights": weights(module), **what}
    torch.save(found, folder / f"{scenario}-{trainer.global_rank}.pt")


def run(folder, scenario):
    data = Blobs(SIZE)
    module = Notes(data)
    distributed = {"devices": 2, "strategy": "ddp", "max_epochs": EPOCHS}
    if scenario == "workers":
        # A partition known in advance, with workers that fetch ahead.
        partition = make_partition(torch.where(data.wrong, 0.1, 0.9), data.y, epoch=1)
        object.__setattr__(partition, "suggested_label", data.clean)
        finetune = Draws(on_noisy="relabel")
        loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)
        trainer = fit(module, loader, [Published(partition), finetune], **distributed | {"max_epochs": 3})
        save(folder, scenario, trainer, module, draws=finetune.draws)
        return
    dry_run = scenario == "report"
    recipe = unsure if scenario == "reweight" else "auto"
    partition = partition_callback(at_epoch=AT, every_n_epochs=2, min_change=0, dry_run=dry_run, recipe=recipe)
    finetune, prune = finetune_callback(kind=Draws, **SETTINGS[scenario]), trio(AT)[1]
    trainer = fit(module, BlobsData(data, batch_size=8), [finetune, prune, partition], **distributed)
    save(
        folder,
        scenario,
        trainer,
        module,
        draws=getattr(finetune, "draws", {}),
        partition=partition.partition.state_dict(),
        rounds=[asdict(drawn) for drawn in partition.rounds],
        summary=asdict(partition.summary),
        state=partition.collector.trajectory.state_dict()["scores"],
    )


def run_all(folder, scenarios):
    for name in scenarios:
        run(folder, name)
