"""What a rank of real processes holds while evidence is gathered and judged; part of :mod:`benchmarks.scaling`."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.evidence.by_index import IndexedEvidence
from lightning_unlearn.evidence.rank_share import Ranks, RankShare
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.identity import mixed
from lightning_unlearn.partitioning.apply_recipe import apply_recipe
from lightning_unlearn.partitioning.build import CleanCriteria, build_partition
from lightning_unlearn.recipes import get_recipe
from lightning_unlearn.utilities.exchange import exchange_over_ranks

# Rows that come together.
_WINDOW = 4_096
_EPOCHS = 2
_MEASURED = ("evidence", "gathering", "judging", "hand over")
_CLEAN = CleanCriteria(0.85, 0.1)


def over_gloo(rank: int, world_size: int, port: int) -> Ranks:
    """The real processes that call it, as one of them sees them."""
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)

    def reduce(part: Tensor) -> Tensor:
        out = part.clone()
        torch.distributed.all_reduce(out)
        return out

    return Ranks(rank, world_size, reduce, exchange_over_ranks(torch.device("cpu"), world_size))


def held_bytes(by_index: IndexedEvidence, trajectory: TrainingDynamics) -> int:
    """What a rank holds of evidence, noted and merged."""
    kept = [value for name, value in vars(trajectory).items() if isinstance(value, Tensor) and name != "basis"]
    noted = {id(part): part for one in by_index._noted for part in one}.values()
    return sum(value.nbytes for value in [*kept, *noted])


def of_memory(total: int, num_classes: int, rank: int, world_size: int, port: int, sender: Any) -> None:
    """Send, from rank 0, the most that any rank held, and how long handing over took.

    ``evidence`` are the bytes of the tensors as an epoch ends, ``gathering`` the most that was resident when two had
    been handed over, ``judging`` the most when the partition had been made as well.
    """
    torch.set_num_threads(1)
    ranks = over_gloo(rank, world_size, port) if world_size > 1 else Ranks()
    # What torch and gloo take for themselves with the first rows is of any size.
    _Gathering(_WINDOW * world_size, num_classes, ranks).epoch(0)
    before = resident_bytes()
    gathering = _Gathering(total, num_classes, ranks)
    for phase in range(_EPOCHS):
        found = gathering.epoch(phase)
    gathered = peak_bytes()
    gathering.judge()
    mine = torch.tensor([found["evidence"], gathered - before, peak_bytes() - before, found["hand over"]])
    rows = torch.zeros(world_size, len(_MEASURED))
    rows[rank] = mine
    largest = ranks.reduce(rows).amax(dim=0).tolist()
    if world_size > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        of_what = {"processes": world_size, "samples": total, "classes": num_classes}
        sender.send(of_what | dict(zip(_MEASURED, largest, strict=True)))


class _Gathering:
    """Evidence of drawn logits, in which the true class leads; one label in five is another.

    Args:
        total: N.
        num_classes: C.
        ranks: of which it is one.
    """

    def __init__(self, total: int, num_classes: int, ranks: Ranks) -> None:
        self.by_index, self.total, self.ranks = IndexedEvidence(), total, ranks
        self.by_index.start(ranks, total, 1)
        self.trajectory = TrainingDynamics(self.by_index.rows, num_classes)
        self.num_classes = num_classes
        if ranks.number > 1:
            self.trajectory.rest()

    def epoch(self, phase: int) -> dict[str, float]:
        """An epoch of training steps, in an order that takes no memory; what was held, and for how long handed over."""
        stride = next(one for one in (7_919, 7_907) if self.total % one)
        drawn = torch.arange(_WINDOW) * self.ranks.number + self.ranks.rank
        for first in range(0, self.total, self.ranks.number * _WINDOW):
            at = first + drawn
            index = at[at < self.total] * stride % self.total
            self.by_index.note(self.trajectory, index, *self._drawn(index))
        found: dict[str, float] = {"evidence": held_bytes(self.by_index, self.trajectory)}
        started = time.process_time()
        self.by_index.hand_over(self.trajectory)
        found["hand over"] = time.process_time() - started
        self.trajectory.merge(phase, self.ranks.reduce)
        return found

    def _drawn(self, index: Tensor) -> tuple[Tensor, Tensor]:
        true = index % self.num_classes
        logits = torch.randn(len(index), self.num_classes)
        logits[torch.arange(len(index)), true] += 3
        return logits, torch.where(
            index % 5 == 0, (true + 1 + index // 5 % (self.num_classes - 1)), true
        ) % self.num_classes

    def judge(self) -> None:
        """Make the partition, by what a last pass over this rank's own samples shows."""
        of_rank, columns = RankShare.by_index(self.total, self.ranks), []
        for index in of_rank.index.split(_WINDOW):
            logits, label = self._drawn(index)
            loss, margin = cross_entropy(logits, label, reduction="none"), label_margin(logits, label)
            last = self.trajectory.of_last_pass(logits, label)
            shown = {"label": label, "loss": loss, "margin": margin, "prediction": logits.argmax(dim=1)}
            columns.append({**last, **shown, "identity": mixed(index + 1)})
        share = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
        del columns
        task_format = TaskFormat()
        task_format.infer_task(logits, label)
        fit: Any = SimpleNamespace(
            reduce=self.ranks.reduce, device=torch.device("cpu"), model=torch.nn.Identity(), task_format=task_format
        )
        judged, label = apply_recipe(fit, share, self.trajectory, of_rank, get_recipe("label"), lambda found: found)
        build_partition(judged, label, _CLEAN, self.ranks.reduce, recipe="label", layer="head", epoch=_EPOCHS)


def peak_bytes() -> int:
    """Return the most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
