"""Training batches of a stream, from which excluded rows are removed on delivery.

Removed rows are still loaded, but not computed. Every rank takes as many steps as before. A batch without a remaining
row (fewer than two for a network with batch norm) goes through the step with the rows most likely to be clean and a
zero gradient, so that ranks stay synchronized and nothing is learned from it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_unlearn.data.sample_key import Key
from lightning_unlearn.finetuning.relabel import check_arrives
from lightning_unlearn.finetuning.subset_data import SubsetData
from lightning_unlearn.finetuning.training_subset import TrainingSubset
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.batch_rows import take_rows
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.keyed_batches import KeyedBatches
from lightning_unlearn.trainer.progress import rank_zero_info

# The number of steps does not depend on the size of batches, so that one stands for all.
_SIZE = 1


class KeyedSubset(SubsetData):
    """Lets a fit train on a subset of samples that are known by a key; the number of its steps stays.

    Args:
        keyed: reads the keys of batches.
    """

    is_by_key = True

    def __init__(self, keyed: KeyedBatches) -> None:
        self._keyed = keyed
        super().__init__()

    @override
    def reset(self) -> None:
        super().reset()
        self._least = 1
        self._is_muted = False
        self._counts = torch.zeros(3, dtype=torch.float64)
        self._has_said = self._has_learned = False

    @override
    def forget_plan(self) -> None:
        self.planned_batches, self.planned_size = 0, _SIZE

    @override
    def begin(self, fit: FitContext) -> None:
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        batch = self._keyed.first
        keys = self._keyed.reader.read(batch)
        path = self._keyed.reader.container(batch)
        if not path and _is_of_loaders(batch, fit.given_loaders):
            raise TypeError(
                "Expected sample_key to name one loader, since the batch contains several; use a field of one of"
                f" them, such as {_example(batch)!r}."
            )
        few = torch.arange(max(1, len(keys) - 1))
        if self._keyed.reader.read(take_rows(batch, few, len(keys), path)) != [keys[at] for at in few.tolist()]:
            raise TypeError(
                "Expected sample_key to give a row the same key in a part of a batch as in the whole batch, but"
                " the keys differ; compute each key from its row alone."
            )

    @override
    def prepare_relabeling(self, fit: FitContext, head: str | None, *, is_new: bool) -> None:
        with fit.isolated_eval(), torch.no_grad():
            check_arrives(fit, self._keyed.first)
        self.relabeling.learn_from([self._keyed.first], fit.task_format, head)
        self._has_learned = True

    @override
    def plan(self, fit: FitContext) -> None:
        # 0 where the number is not known.
        batches = fit.batches_per_epoch
        self.planned_batches = int(batches) if batches < float("inf") else 0

    @override
    def at_once(self, fit: FitContext) -> int:
        return _SIZE

    @override
    def fault_of(self, fit: FitContext, subset: TrainingSubset, *, keeps_plan: bool) -> str:
        return "" if len(subset.index) else "are none"

    @override
    def follow(
        self,
        fit: FitContext,
        subset: TrainingSubset,
        partition: Callable[[], Partition],
        keeps_plan: Callable[[], bool],
    ) -> None:
        norms = any(isinstance(one, nn.modules.batchnorm._NormBase) for one in fit.model.modules())
        self._least, task_format = 2 if norms else 1, fit.task_format
        trained = _places(subset)
        if subset.new_label is not None:
            self.relabeling.watch(task_format)

        def change(batch: Any, keys: list[Any]) -> Any:
            known = partition()
            index = known.indices_of(keys)
            rows = self._rows(known, index, self._is_trained(subset, trained, index, keys, fit.epoch))
            if len(rows) < len(keys):
                batch, index = take_rows(batch, rows, len(keys), self._keyed.reader.container(batch)), index[rows]
            if subset.new_label is None:
                return batch
            if not self._has_learned:
                # In a fit that goes on, this is the first batch.
                self.relabeling.learn_from([self._keyed.first], task_format, None)
                self._has_learned = True
            # Of a sample that the partition does not know, none.
            is_known = (index >= 0).reshape(-1, *[1] * (known.label.ndim - 1))
            new, given = (torch.where(is_known, of[index], -1) for of in (subset.new_label, known.label))
            return self.relabeling.replaced(batch, new.flatten(), given.flatten(), len(index))

        self._keyed.change = change

    def _is_trained(
        self, subset: TrainingSubset, trained: dict[int, int], index: Tensor, keys: list[Any], epoch: int
    ) -> Tensor:
        """Return (B,) bool, the rows to train on; samples that are not in the partition are trained on unchanged."""
        place = [trained.get(at, -1) for at in index.tolist()]
        is_in = torch.tensor([at >= 0 for at in place]) | (index < 0)
        if subset.probability is None:
            return is_in
        share = torch.tensor([float(subset.probability[at]) if at >= 0 else 1.0 for at in place])
        return is_in & (torch.tensor([_uniform(self.seed, epoch, key) for key in keys]) < share)

    def _rows(self, known: Partition, index: Tensor, is_trained: Tensor) -> Tensor:
        """Return (b,) int64, the rows to keep in the batch, and record whether their gradient is to be zeroed."""
        rows = is_trained.nonzero().flatten()
        self._is_muted = len(rows) < min(self._least, len(index))
        self._counts += torch.tensor([len(index), len(index) - len(rows), self._is_muted], dtype=torch.float64)
        if not self._is_muted:
            return rows
        doubt = torch.where(is_trained, -1, 1 - known.clean_probability[index.clamp(min=0)])
        return doubt.argsort(stable=True)[: self._least].sort().values

    @override
    def before_backward(self, loss: Tensor) -> None:
        # A batch without a row to learn from teaches nothing.
        if self._is_muted and loss.requires_grad:
            loss.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]

    @override
    def end_epoch(self, fit: FitContext) -> None:
        if self._has_said or not self._keyed.change:
            return
        self._has_said = True
        rows, gone, muted = (int(one) for one in fit.reduce(self._counts).tolist())
        empty = f"; {muted:,} batches had no row left and contributed a zero gradient" if muted else ""
        rank_zero_info(
            f"{gone:,} of {rows:,} rows of this epoch were loaded and then removed from their batches{empty}."
        )

    @override
    def detach(self, fit: FitContext | None) -> None:
        self._keyed.change = None
        self._is_muted = False
        self.relabeling.detach()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.planned_size = _SIZE


def _places(subset: TrainingSubset) -> dict[int, int]:
    """Return where each sample that is trained on stands in the subset."""
    return {index: at for at, index in enumerate(subset.index.tolist())}


def _uniform(seed: int, epoch: int, key: Key) -> float:
    """Return a number in [0, 1) that differs by epoch and is the same on every rank."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _is_of_loaders(batch: Any, loaders: Any) -> bool:
    """Return whether a batch holds those of several loaders, under the names that these have."""
    if isinstance(loaders, Mapping):
        return isinstance(batch, Mapping) and set(batch) == set(loaders) and len(loaders) > 1
    is_list = isinstance(loaders, (list, tuple)) and isinstance(batch, (list, tuple))
    return is_list and len(batch) == len(loaders) > 1


def _example(batch: Any) -> str:
    return f"{next(iter(batch)) if isinstance(batch, Mapping) else 0}.key"
