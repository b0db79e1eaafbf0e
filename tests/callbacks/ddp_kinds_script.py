"""What test_ddp_kinds.py runs in processes of its own: one for each rank, and one that starts others."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback
from lightning_unlearn.pruning.criteria import Sensitivity
from tests.callbacks.published import Published, make_partition
from tests.toys import Blobs, BlobsData, IndexRecorder, Toy, by_margin, fit, mlp, quick_trio, trio, weights

SIZE, AT, BATCH = 103, 2, 8
SPAWNING = ("ddp_notebook", "ddp_spawn")


def plain():
    """No batch norm, whose statistics are each rank's own."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 4))


class WithSpare(Toy):
    """Has a parameter that no step uses."""

    def __init__(self, net):
        super().__init__(net)
        self.spare = nn.Linear(3, 3)


class OwnSampler(BlobsData):
    def train_dataloader(self):
        sampler = DistributedSampler(self.train, self.trainer.world_size, self.trainer.global_rank, seed=5)
        return DataLoader(self.train, batch_size=BATCH, sampler=sampler)


def averaging():
    """Lightning's moving average of the weights, new in 2.6."""
    kind = getattr(L.pytorch.callbacks, "EMAWeightAveraging", None)
    return [] if kind is None else [kind(decay=0.8)]


# Right labels, of which a person says that they are to go.
DROPPED = Blobs(SIZE).wrong.logical_not().nonzero().flatten()[:5].tolist()
SCENARIOS = {
    "static": {"strategy": lambda: DDPStrategy(static_graph=True)},
    "static layers": {"strategy": lambda: DDPStrategy(static_graph=True), "finetune": {"mode": "layers"}},
    "unused": {
        "strategy": lambda: DDPStrategy(find_unused_parameters=True),
        "finetune": {"mode": "layers", "lr": 0.02},
        "module": WithSpare,
    },
    "unsplit": {"partition": {"recipe": "label"}, "trainer": {"use_distributed_sampler": False}},
    "own sampler": {"trainer": {"use_distributed_sampler": False}, "data": OwnSampler},
    "averages": {"callbacks": averaging},
    "rounds": {
        "partition": {"recipe": "label", "every_n_epochs": 2, "min_change": 0},
        "finetune": {"on_noisy": "reweight"},
        "epochs": 6,
    },
}


def fit_one(name, *more, devices=2, review=None, **kwargs):
    """What a fit has found and made on this rank."""
    chosen, data = SCENARIOS[name], Blobs(SIZE)
    module, record, before = chosen.get("module", Toy)(plain), IndexRecorder(data), Before()
    partition, prune, finetune = trio(
        AT,
        prune={"criterion": Sensitivity(fdr_level=None), "max_val_drop": None},
        finetune=chosen.get("finetune"),
        review=review,
        **{"recipe": by_margin, **chosen.get("partition", {})},
    )
    strategy = chosen.get("strategy", lambda: "ddp")() if devices > 1 else "auto"
    trainer = fit(
        module,
        chosen.get("data", BlobsData)(data, batch_size=BATCH),
        [before, finetune, record, prune, partition, *chosen.get("callbacks", list)(), *more],
        **{
            "max_epochs": chosen.get("epochs", AT + 2),
            "devices": devices,
            "strategy": strategy,
            **chosen.get("trainer", {}),
            **kwargs,
        },
    )
    return {
        "partition": partition.partition.state_dict(),
        "rounds": [drawn.epoch for drawn in partition.rounds],
        "mask": prune.mask.keep,
        "read": record.by_epoch,
        "batches": trainer.num_training_batches,
        "requires_grad": all(p.requires_grad for p in module.parameters()),
        "before": before.weights,
        "weights": weights(module),
    }


class Before(L.Callback):
    """The weights when fine-tuning begins."""

    weights = None

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == AT:
            self.weights = weights(pl_module)


def few(clean, net=plain, **loader):
    """A fit in which only some samples are clean, known in advance."""
    data = Blobs(SIZE)
    probability = torch.full((SIZE,), 0.1)
    probability[:clean] = 0.9
    record, module = IndexRecorder(data), Toy(net)
    finetune = CleanSubsetFinetuneCallback()
    published = Published(make_partition(probability, data.y))
    fit(
        module,
        BlobsData(data, batch_size=BATCH, **loader),
        [finetune, record, published],
        max_epochs=3,
        devices=2,
        strategy="ddp",
    )
    return {
        "read": record.by_epoch,
        "is_active": finetune.is_active,
        "weights": {name: value for name, value in weights(module).items() if "running" not in name},
    }


FEW = {
    "one": lambda: few(1),
    "three": lambda: few(3),
    "one with norms": lambda: few(1, mlp),
    "no full batch": lambda: few(12, drop_last=True),
}


def reviewed(folder):
    """A fit with a table that only rank 0 has."""
    path, rank = folder / "suspects.csv", torch.distributed.get_rank()
    if rank == 0:
        path.write_text("".join(["index,decision\n", *(f"{index},drop\n" for index in DROPPED)]))
    return fit_one("static", review=path if rank == 0 else folder / "nowhere.csv")


class Validated(BlobsData):
    """With as many validation samples as ranks do not share evenly."""

    def __init__(self, train, valid, **kwargs):
        super().__init__(train, **kwargs)
        self.valid = valid

    def val_dataloader(self):
        return DataLoader(self.valid, batch_size=BATCH)


def validated(name, devices=2, size=45):
    """What is found of validation samples, by what the model says right then, and by the default."""
    module, before, valid = Toy(plain), Before(), Blobs(size, 0.2, seed=7)
    if devices > 1 and name == "one more":
        valid = Blobs(size - torch.distributed.get_rank(), 0.2, seed=7)
    recipe = "argmax" if name == "argmax" else "auto"
    partition = AttributionPartitionCallback(at_epoch=AT, dry_run=True, recipe=recipe, judge_validation=True)
    data = Validated(Blobs(SIZE), valid, batch_size=BATCH)
    try:
        fit(module, data, [before, partition], max_epochs=AT + 1, devices=devices, strategy="ddp")
    except ValueError as error:
        return {"said": str(error), "steps": module.steps}
    return {"partition": partition.validation_partition.state_dict(), "before": before.weights}


def in_another_order(data, rank):
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(rank))
    data.x, data.y = data.x[order], data.y[order]


def one_label(data, rank):
    """Not among those that are looked at before the first step."""
    data.y[2] = (data.y[2] + rank) % 4


def one_more(data, rank):
    data.x, data.y = data.x[: SIZE - rank], data.y[: SIZE - rank]


def other_items(data, rank):
    data.x = data.x + rank


OTHER_DATA = {change.__name__: change for change in (in_another_order, one_more, other_items, one_label)}


def refused(name):
    """What is said where the ranks have different data, and after how many steps."""
    data, module = Blobs(SIZE), Toy(plain)
    OTHER_DATA[name](data, torch.distributed.get_rank())
    try:
        fit(module, BlobsData(data, batch_size=BATCH), quick_trio(AT), max_epochs=AT + 1, devices=2, strategy="ddp")
    except ValueError as error:
        return {"said": str(error), "steps": module.steps}
    return {"said": "", "steps": module.steps}


def elsewhere(folder, strategy):
    """A fit in other processes, which leave a checkpoint. Its own is not of a group."""
    partition, prune, finetune = quick_trio(AT, prune={"criterion": Sensitivity(fdr_level=None), "max_val_drop": None})
    keep = ModelCheckpoint(folder / strategy, "last", save_on_train_epoch_end=True)
    fit(
        Toy(plain),
        BlobsData(Blobs(SIZE), batch_size=BATCH),
        [partition, prune, finetune, keep],
        max_epochs=AT + 2,
        devices=2,
        strategy=strategy,
        enable_checkpointing=True,
    )
    torch.save({"is here": partition.has_result}, folder / f"{strategy}.pt")


def run(folder):
    found = {"few": {name: make() for name, make in FEW.items()}}
    kept = ModelCheckpoint(folder / "rounds", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    for name in SCENARIOS:
        found[name] = fit_one(name, kept, enable_checkpointing=True) if name == "rounds" else fit_one(name)
    # Between two rounds.
    path = folder / "rounds" / f"epoch={AT}.ckpt"
    found["resumed"] = fit_one("rounds", ckpt_path=path)
    found["reviewed"] = reviewed(folder)
    found["validated"] = {name: validated(name) for name in ("argmax", "auto", "one more")}
    found["refused"] = {name: refused(name) for name in OTHER_DATA}
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")
