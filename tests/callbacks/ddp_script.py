"""Run by test_ddp.py in a process of its own, which Lightning starts once more for the second rank.

Usage: ddp_script.py FOLDER NUMBER_OF_PROCESSES SCENARIO...
"""

import sys
from dataclasses import fields, replace
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, WeightedRandomSampler

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, UnlearnReport
from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.recipes import RECIPES
from tests.callbacks.test_resumed_otherwise import per_step
from tests.evidence import test_training_steps as evidence
from tests.evidence.test_step_reader import BATCH, Coded, Net
from tests.toys import Blobs, BlobsData, IndexRecorder, Toy, fit, mlp, trio, weights

AT = 5


def still(module):
    """Learns nothing, so that only the scoring differs between one process and two."""
    return torch.optim.SGD(module.parameters(), lr=0.0)


def pretrained():
    """An MLP without norms, trained for a while on the same samples in every process alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = Blobs(101)
        net = torch.nn.Sequential(torch.nn.Linear(16, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(data.x), data.y).backward()
            optimizer.step()
    return net


class Told:
    """The recipe for labels, which keeps what it was told of labels that were not learned."""

    def __call__(self, evidence, reduce):
        self.out_of_sample = evidence.out_of_sample
        return RECIPES["label"].function(evidence, reduce)


def numbers(rate):
    return {name: float(value) for name, value in vars(rate).items() if name != "bias"}


class Failing(AttributionPartitionCallback):
    """Fails on one rank, in the middle of a pass."""

    def validate_setup(self, trainer, pl_module):
        super().validate_setup(trainer, pl_module)
        pass_over = self.collector.pass_over

        def fails(fit):
            if trainer.global_rank == 1:
                self.task_format.split = lambda _: 1 / 0
            return pass_over(fit)

        self.collector.pass_over = fails


def weights_of(data):
    """The first class twice as often as others, and ten samples not at all."""
    weight = 1.0 + (data.clean == 0)
    weight[:10] = 0
    return weight


class Watched(L.Callback):
    """Parameters and buffers when the last full epoch is over."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == AT - 1:
            self.before = weights(pl_module)


def run(folder, devices, scenario):
    distributed = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    data, watch, told = Blobs(101), Watched(), Told()
    record = IndexRecorder(data)
    if scenario == "fails":
        fit(Toy(), BlobsData(data), [Failing(at_epoch=AT)], max_epochs=AT + 2, **distributed)
        return
    others = {"evidence": run_evidence, "early": run_early, "resumed": run_resumed}
    if scenario in others:
        others[scenario](folder, devices, distributed)
        return
    loader = {}
    if scenario.startswith("weighted"):
        loader = {"shuffle": None, "sampler": WeightedRandomSampler(weights_of(data), 150)}
        distributed["use_distributed_sampler"] = scenario == "weighted"
    settings = {
        "still": {
            "net": pretrained,
            "optimizer": still,
            "finetune": {},
            "recipe": replace(RECIPES["label"], function=told),
        },
        "still-rlap": {"net": pretrained, "optimizer": still, "finetune": {}, "recipe": "rlap"},
        "layers": {"net": mlp, "finetune": {"mode": "layers", "lr": 0.02}},
        "full": {"net": mlp, "finetune": {"lr": 0.02, "warm_start": "shrink"}},
        "auto": {"net": mlp, "finetune": {"lr": 0.02}, "recipe": "auto"},
        "when": {"net": mlp, "finetune": {}, "at_epoch": "auto"},
        "weighted": {"net": mlp, "finetune": {}},
        "weighted-each": {"net": mlp, "finetune": {}},
    }[scenario]
    recipe = settings.get("recipe", "label")
    recipe = replace(RECIPES["label"], function=told) if recipe == "told" else recipe
    # The regression alone: what it finds is what is pruned.
    plain = {"criterion": Sensitivity(fdr_level=None), "max_val_drop": None}
    at_epoch = settings.get("at_epoch", AT)
    partition, prune, finetune = trio(at_epoch, prune=plain, finetune=settings["finetune"], recipe=recipe)
    module = Toy(settings["net"], **({"optimizer": settings["optimizer"]} if "optimizer" in settings else {}))
    reports = [UnlearnReport(folder / f"report-{devices}", samples=5)] if scenario == "full" else []
    callbacks = [*reports, finetune, record, prune, watch, partition]
    # Each rank has a loss of its own.
    callbacks += [EarlyStopping("val_loss", patience=2, min_delta=1e9)] if scenario == "when" else []
    trainer = fit(module, BlobsData(data, **loader), callbacks, max_epochs=AT + 2, **distributed)
    torch.save(
        {
            "partition": partition.partition.state_dict(),
            "mask": prune.mask.keep if prune.has_result else None,
            "sensitivity": prune.sensitivity if prune.has_result else None,
            "read": record.by_epoch,
            "before": watch.before,
            "weights": weights(module),
            "target": prune.target_layer(),
            "left_out": numbers(told.out_of_sample.left_out) if scenario == "still" else None,
            # As text, since NaN is not equal to itself.
            "when": str(partition.state_dict()["when"]),
        },
        folder / f"{scenario}-{devices}-{trainer.global_rank}.pt",
    )


def run_resumed(folder, devices, distributed):
    """Goes on from a checkpoint of the other number of processes, where there is one, and leaves one of its own."""
    other = folder / f"resumed-{3 - devices}.ckpt"
    data, keep = BlobsData(Blobs(101), by_epoch=devices == 1), ModelCheckpoint(folder, filename=f"resumed-{devices}")
    record, (partition, _, finetune) = IndexRecorder(data.train), trio(2)
    trainer = fit(
        Toy(optimizer=per_step),
        data,
        [partition, finetune, record, keep],
        ckpt_path=other if other.exists() else None,
        max_epochs=6 if devices == 2 else 4 + 4 * other.exists(),
        enable_checkpointing=True,
        **distributed,
    )
    found = {"clean": partition.partition.clean_indices(), "read": record.by_epoch, "summary": vars(partition.summary)}
    # Once more, from the last checkpoint, with no step left.
    again, _, _ = trio(2)
    path, epochs = folder / f"resumed-{devices}.ckpt", trainer.max_epochs
    rest = [again, CleanSubsetFinetuneCallback()]
    fit(Toy(optimizer=per_step), data, rest, ckpt_path=path, max_epochs=epochs, **distributed)
    found["again"] = vars(again.summary)
    torch.save(found, folder / f"resumed-{devices}-{trainer.global_rank}.rank")


class Evidence(L.Callback):
    """Of how many samples a rank holds evidence."""

    def __init__(self, partition):
        self.partition = partition

    def on_train_batch_end(self, trainer, pl_module, *_):
        if (held := self.partition.collector.trajectory) is not None:
            self.rows = len(held)


def run_early(folder, devices, distributed):
    """Gathers evidence, from a checkpoint of the other number of processes where there is one.

    The network learns nothing, so that each epoch shows the same of a sample.
    """
    other, here = folder / f"early-{3 - devices}-epoch={3 - devices}.ckpt", folder / f"early-{devices}"
    keep = ModelCheckpoint(folder, filename=f"{here.name}-{{epoch}}", save_top_k=-1, save_on_train_epoch_end=True)
    partition = AttributionPartitionCallback(at_epoch=4, recipe="label")
    held = Evidence(partition)
    trainer = fit(
        Toy(pretrained, still),
        BlobsData(Blobs(101)),
        [partition, held, keep],
        ckpt_path=other if other.exists() else None,
        max_epochs=5 if other.exists() else 4,
        enable_checkpointing=True,
        **distributed,
    )
    found = {"partition": partition.partition.state_dict(), "rows": held.rows}
    torch.save(found, here.with_name(f"{here.name}-{trainer.global_rank}.rank"))


def run_evidence(folder, devices, distributed):
    recipe, moment, module = evidence.Keeps(), evidence.LastLogits(), Net(net=evidence.small)
    callback = AttributionPartitionCallback(at_epoch=evidence.AT, recipe=recipe)
    loader = DataLoader(Coded(), batch_size=BATCH, shuffle=True)
    trainer = fit(module, loader, [callback, moment], max_epochs=evidence.AT + 1, **distributed)
    found = {
        "evidence": {field.name: getattr(recipe.evidence, field.name) for field in fields(recipe.evidence)},
        "noted": evidence.rows_of(module.noted),
        "before": moment.before,
        "partition": callback.partition.state_dict(),
    }
    torch.save(found, folder / f"evidence-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[3:]:
        run(Path(sys.argv[1]), int(sys.argv[2]), name)
