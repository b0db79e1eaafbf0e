"""What test_streams_ddp.py runs, in one process and in one for each rank."""

from pathlib import Path

import torch
from torch import distributed

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, DataFormat
from tests.callbacks.fsdp_script import everything, plain, shard, strategy
from tests.callbacks.test_streams import SaveAt
from tests.streams import OfDicts, Stream, key_of, loader_of, narrow_net
from tests.toys import Blobs, fit, mlp, weights

N = 240


class OfRank(Stream):
    """The part of a rank, which is known once there are several."""

    def __iter__(self):
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        return super().__iter__()


class Mistaken(OfRank):
    """The second rank calls some samples by another label than the first, in another epoch."""

    def item(self, index):
        found = super().item(index)
        if index < 40 and self.rank == 1:
            found["label"] = (found["label"] + 1) % 4
        return found


class Lopsided(OfRank):
    """The last batches of the second rank have wrong labels alone, those of the first none."""

    def __iter__(self):
        rank = distributed.get_rank()
        order = self.data.wrong.long().argsort(stable=True)
        right, wrong = order[: N - 48], order[N - 48 :]
        part = right[: N // 2] if rank == 0 else torch.cat([right[N // 2 :], wrong])
        self.epoch += 1
        for index in part.tolist():
            yield self.item(index)


class Sharded(OfDicts):
    def configure_model(self):
        shard(self, self.net)


def decided(folder, data):
    """A table in which all is decided as it is."""
    table = folder / f"decided-{distributed.get_rank() if distributed.is_initialized() else 0}.csv"
    lines = [f"{key_of(at)},{'drop' if wrong else 'keep'}" for at, wrong in enumerate(data.wrong.tolist())]
    table.write_text("\n".join(["key,decision", *lines]))
    return table


def run(folder: Path, ranks: int, *scenarios: str) -> None:
    """Fits, and saves what each rank has."""
    for scenario in scenarios:
        fit_one(folder, ranks, scenario)


def fit_one(folder: Path, ranks: int, scenario: str) -> None:
    data = Blobs(N, 0.2)
    kinds = {"mistaken": Mistaken, "lopsided": Lopsided}
    stream = kinds.get(scenario, OfRank)(data)
    review = decided(folder, data) if scenario == "lopsided" else None
    partition = AttributionPartitionCallback(at_epoch=3, data=DataFormat(sample_key="key"), review=review)
    finetune = CleanSubsetFinetuneCallback(warm_start="shrink" if "plain" in scenario else "keep")
    nets = {"lopsided": mlp, "plain": plain, "plain-sharded": plain}
    module = (Sharded if "sharded" in scenario else OfDicts)(nets.get(scenario, narrow_net))
    more = [SaveAt(2, folder / f"at-2-of-{ranks}.ckpt")] if scenario == "full" else []
    ckpt_path = None
    if scenario.startswith("from-"):
        ckpt_path, stream.epoch = folder / f"at-2-of-{scenario.removeprefix('from-')}.ckpt", 2
    over = strategy() if "sharded" in scenario else "ddp"
    several = {"devices": ranks, "strategy": over} if ranks > 1 else {}
    trainer = fit(module, loader_of(stream), [partition, finetune, *more], max_epochs=5, ckpt_path=ckpt_path, **several)
    found = partition.partition
    torch.save(
        {
            "keys": list(found.keys),
            "p_clean": found.clean_probability,
            "is_clean": found.is_clean,
            "label": found.label,
            "owned": list(partition.collector.by_key._own),
            "trained": {epoch: [key for key, _ in rows] for epoch, rows in module.trained.items()},
            "steps": module.steps_by_epoch,
            "weights": everything(module) if "sharded" in scenario else weights(module),
        },
        folder / f"{scenario}-{ranks}-{trainer.global_rank}.pt",
    )
