"""What test_fsdp.py runs in processes of its own, one for each rank."""

from dataclasses import asdict

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_unlearn import AttributionPartitionCallback, SensitivityPruneCallback
from lightning_unlearn.attribution import ATTRIBUTION_METHODS
from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.recipes import Recipe, RecipeResult
from lightning_unlearn.trainer.validation import score_validation
from lightning_unlearn.utilities.sharding import whole
from tests.callbacks.published import Planted, PlantedData, Published, make_partition
from tests.toys import Blobs, BlobsData, IndexRecorder, Toy, by_margin, fit, mlp, partition_callback, trio

SIZE, AT, PER_RANK = 104, 2, 8
CRITERIA = ("sensitivity", "random", "magnitude", "mean_abs_ratio", "std_ratio", "frequency_ratio", "taylor", "hessian")
REFUSED = {
    "shrink_to": lambda: [SensitivityPruneCallback(shrink_to="small.pt")],
    "averages": lambda: [StochasticWeightAveraging(0.01)],
    "tensor_parallel": list,
}


def plain():
    """No batch norm, whose statistics are each rank's own."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, 4))


def shard(module, net, by_layer=True, **kwargs):
    """What a user does in ``configure_model``, which does nothing without a mesh."""
    if module.device_mesh is None or any(isinstance(part, FSDPModule) for part in module.modules()):
        return
    mesh = module.device_mesh["data_parallel"]
    for layer in net.children() if by_layer else ():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh, **kwargs)


class Sharded(Toy):
    def configure_model(self):
        shard(self, self.net)


class MadeLate(Toy):
    """Its layers are made where they are sharded, after the callbacks have been set up."""

    def __init__(self, net):
        super().__init__(nn.Identity)
        self.make = net

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            with torch.random.fork_rng():
                torch.manual_seed(3)
                self.net = self.make()
        shard(self, self.net)


class InOnePiece(Toy):
    """Its weights, all of them the outermost module's, are left whole after a pass."""

    def configure_model(self):
        shard(self, self, by_layer=False)


class InPieces(Toy):
    """After a pass its weights, all of them the outermost module's, are in pieces again."""

    def configure_model(self):
        shard(self, self, by_layer=False, reshard_after_forward=True)


class ShardedPlanted(Planted):
    def configure_model(self):
        shard(self, self)


def by_rows(evidence, reduce):
    """Looks at what the paper's recipe looks at."""
    total = evidence.neuron_attribution.sum(dim=1) * evidence.weight
    mean = reduce(total.sum()) / reduce(evidence.weight.sum())
    probability = (evidence.margin + evidence.neuron_attribution.sum(dim=1) / mean).sigmoid().float()
    return RecipeResult(probability, evidence.prediction)


BY_ROWS = Recipe("rows", by_rows, needs_neuron_attribution=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.8, weight_decay=0.01)


# The settings of a fit; the optimizer's momentum and weight decay would revive what is pruned.
SCENARIOS = {
    "full": {"max_val_drop": None, "partition": {"recipe": "label"}},
    "rounds": {
        "partition": {"recipe": "label", "every_n_epochs": 2, "min_change": 0},
        "finetune": {"on_noisy": "relabel", "relabel_threshold": 0.4},
        "trainer": {"accumulate_grad_batches": 2, "max_epochs": AT + 4},
    },
    "reweight": {
        "module": InOnePiece,
        "partition": {"recipe": "label"},
        "finetune": {"on_noisy": "reweight"},
        "trainer": {"gradient_clip_val": 0.5},
    },
    "layers": {
        "module": MadeLate,
        "max_val_drop": None,
        "partition": {"recipe": "label"},
        "finetune": {"mode": "layers", "layers": ["net.2", "net.4"]},
    },
    "shrink": {"module": InOnePiece, "partition": {"recipe": "label"}, "finetune": {"warm_start": "shrink"}},
    "start": {"partition": {"recipe": "label"}, "finetune": {"warm_start": "start", "optimizer": sgd}},
    "lr": {"partition": {"recipe": "label"}, "finetune": {"lr": 0.02}},
    "norms": {"net": mlp, "finetune": {"mode": "layers"}},
    "rows": {"module": InPieces, "partition": {"recipe": BY_ROWS, "evidence_from": "eval_passes"}},
    "report": {"module": InOnePiece, "partition": {"dry_run": True}},
}
STRATEGIES = {
    "single": {"devices": 1},
    "ddp": {"devices": 2, "strategy": "ddp"},
    "fsdp": {"devices": 2},
}


def strategy(**kwargs):
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **kwargs)


def settings(kind, **kwargs):
    """The Trainer's arguments."""
    return {**STRATEGIES[kind], **({"strategy": strategy(**kwargs)} if kind == "fsdp" else {})}


def everything(module):
    """The whole weights, on every rank."""
    return {name: whole(value).clone() for name, value in module.state_dict().items()}


class InStep(BlobsData):
    """Splits the batches of one process over two, with a sampler of the user's own."""

    def train_dataloader(self):
        ranks = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        sampler = DistributedSampler(self.train, **ranks, seed=1)
        return DataLoader(self.train, batch_size=2 * PER_RANK // self.trainer.world_size, sampler=sampler)


def make_module(scenario):
    chosen = SCENARIOS[scenario]
    return chosen.get("module", Sharded)(chosen.get("net", plain))


def callbacks_of(scenario):
    chosen = SCENARIOS[scenario]
    # The regression alone: what it finds is what is pruned.
    return trio(
        AT,
        prune={"criterion": Sensitivity(fdr_level=None), "max_val_drop": chosen.get("max_val_drop", 0.01)},
        finetune=chosen.get("finetune"),
        **{"recipe": by_margin, **chosen.get("partition", {})},
    )


def fit_one(kind, scenario, *more, ckpt_path=None, full=False, **kwargs):
    """What a fit has found and made."""
    data, module = Blobs(SIZE), make_module(scenario)
    record, before, (partition, prune, finetune) = IndexRecorder(data), Before(), callbacks_of(scenario)
    chosen = settings(kind, **({"save_distributed_checkpoint": False} if full and kind == "fsdp" else {}))
    fit(
        module,
        InStep(data),
        [before, finetune, record, prune, partition, *more],
        ckpt_path=ckpt_path,
        **{"max_epochs": AT + 2, **SCENARIOS[scenario].get("trainer", {}), **chosen, **kwargs},
    )
    return {
        "partition": partition.partition.state_dict(),
        "rounds": [(drawn.epoch, drawn.suspects) for drawn in partition.rounds],
        "masks": [mask.keep for mask in prune.masks] if prune.has_result else [],
        "sensitivity": [mask.sensitivity for mask in prune.masks] if prune.has_result else [],
        "said": prune.summary_clause(),
        "summary": asdict(partition.summary),
        "draw": finetune.training_subset.state_dict() if finetune.is_active else {},
        "read": record.by_epoch,
        "before": before.weights,
        "weights": everything(module),
    }


class Before(L.Callback):
    """The weights that the last full epoch begins with."""

    weights = None

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == AT:
            self.weights = everything(pl_module)


class Moment(ModelCheckpoint):
    """Keeps the checkpoints of all epochs."""

    def __init__(self, folder):
        super().__init__(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)


def resumed(folder):
    """What becomes of fits that are resumed: before the partition, in fine-tuning and after another round."""
    paths = {epoch: folder / "rounds" / f"epoch={epoch}.ckpt" for epoch in (0, AT, AT + 2)}
    found = {f"rounds-{epoch}": fit_one("fsdp", "rounds", ckpt_path=path) for epoch, path in paths.items()}
    for name, epochs in (("shrink", (0, AT)), ("start", (0, AT)), ("lr", (AT,))):
        for epoch in epochs:
            found[f"{name}-{epoch}"] = fit_one("fsdp", name, ckpt_path=folder / name / f"epoch={epoch}.ckpt")
    found["full"] = fit_one("fsdp", "full", full=True, ckpt_path=folder / "full" / f"epoch={AT}.ckpt")
    return found


def pruned_by(kind, **arguments):
    """The mask of neurons whose partition is known in advance."""
    data = PlantedData(101, validation=False)
    drop = 0.01 if arguments["criterion"] == "sensitivity" else None
    prune = SensitivityPruneCallback("fc", amount=0.5, max_val_drop=drop, **arguments)
    module = ShardedPlanted()
    published = Published(make_partition(data.probability(), data.y))
    fit(module, data, [prune, published], max_epochs=2, **settings(kind))
    return {"keep": prune.mask.keep, "score": prune.mask.sensitivity, "weight": everything(module)["fc.weight"]}


def attributed_by(kind, method):
    partition = partition_callback(at_epoch=1, attribution_method=method, recipe=by_margin, evidence_from="eval_passes")
    module = make_module("full")
    fit(module, InStep(Blobs(SIZE)), [partition], max_epochs=2, **settings(kind))
    return {"probability": partition.partition.clean_probability, "weights": everything(module)}


def untouched():
    """The weights of a fit without any callback of ours."""
    module = make_module("full")
    fit(module, InStep(Blobs(SIZE)), max_epochs=2, **settings("fsdp"))
    return everything(module)


def refusals():
    found = {}
    for name, make in REFUSED.items():
        parallel = ModelParallelStrategy() if name == "tensor_parallel" else strategy()
        callbacks = [AttributionPartitionCallback(at_epoch=1, recipe=by_margin), *make()]
        try:
            fit(Sharded(plain), BlobsData(Blobs(SIZE)), callbacks, max_epochs=2, devices=2, strategy=parallel)
        except MisconfigurationException as error:
            found[name] = str(error)
    return found


class Unscored(AttributionPartitionCallback):
    """Asks for the score where one rank cannot split its second validation batch."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        split, seen = self.task_format.split, []

        def fails(batch):
            seen.append(batch)
            return split(batch) if len(seen) < 2 or trainer.global_rank == 0 else 1 / 0

        self.task_format.split = fails
        try:
            self.scores = [score_validation(self.fit)]
        finally:
            self.task_format.split = split
        score = score_validation(self.fit)
        self.scores.append((score.accuracy, score.loss, score.samples))


def unscored():
    callback = Unscored(at_epoch=1, recipe=by_margin)
    data = InStep(Blobs(SIZE))
    data.val_dataloader = lambda: DataLoader(Blobs(53, 0, seed=7), batch_size=PER_RANK)
    fit(make_module("full"), data, [callback], max_epochs=2, **settings("fsdp"))
    return callback.scores


def fails():
    """Ends on one rank, in the middle of a pass: its data set fails where it has served the steps of an epoch."""

    class Failing(Blobs):
        def __getitem__(self, index):
            if self.failing and index == 51:  # rank 1 scores the odd ones
                raise ZeroDivisionError
            return super().__getitem__(index)

    data, callback = Failing(SIZE), AttributionPartitionCallback(at_epoch=1, recipe=by_margin)
    data.failing = False
    pass_over = callback.collector.pass_over

    def begins(fit):
        data.failing = True
        return pass_over(fit)

    callback.collector.pass_over = begins
    fit(make_module("full"), InStep(data), [callback], max_epochs=2, **settings("fsdp"))


def run(folder):
    # Checkpoints of one kind are a folder, of the other a file.
    kept = {name: [Moment(folder / name)] for name in ("full", "rounds", "shrink", "start", "lr")}
    found = {
        "ddp": fit_one("ddp", "full"),
        "fsdp": {
            name: fit_one("fsdp", name, *kept.get(name, ()), full=name == "full", enable_checkpointing=name in kept)
            for name in SCENARIOS
        },
        "resumed": resumed(folder),
        "criteria": {name: pruned_by("fsdp", criterion=name) for name in CRITERIA},
        "methods": {method: attributed_by("fsdp", method) for method in ATTRIBUTION_METHODS},
        "untouched": untouched(),
        "refused": refusals(),
        "unscored": unscored(),
    }
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")
    fails()
