"""The user's train loader, restricted to a subset during fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_unlearn.data.loaders import check_loader
from lightning_unlearn.data.sampling_scheme import SamplingScheme
from lightning_unlearn.data.subset_sampler import (
    CleanSubsetSampler,
    SamplerSwap,
    batch_sampler_error,
    check_sampler,
)
from lightning_unlearn.finetuning.relabel import check_relabeling, fault_of_absent
from lightning_unlearn.finetuning.subset_data import SubsetData
from lightning_unlearn.finetuning.training_subset import TrainingSubset
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.isolation import isolate_rng
from lightning_unlearn.trainer.running_fit import RunningFit
from lightning_unlearn.trainer.train_data import TrainDataSwap


class SubsetLoader(SubsetData):
    """Lets the loader of a fit draw from a subset, in the user's way, and gives it back."""

    def __init__(self) -> None:
        self._swap, self._narrowed = TrainDataSwap(), SamplerSwap()
        super().__init__()

    @override
    def begin(self, fit: RunningFit) -> None:
        loader = fit.train_loader
        seed = self.scheme(fit, loader).seed
        # Without a seed of the user's, the one that Lightning gives its own samplers.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        with isolate_rng():
            fault = batch_sampler_error(loader)
        if fault:
            raise TypeError(fault)

    @override
    def prepare_relabeling(self, fit: FitContext, head: str | None, *, is_new: bool) -> None:
        if is_new:
            check_relabeling(fit)
        self.relabeling.learn(fit, head)

    @override
    def plan(self, fit: RunningFit) -> None:
        self.planned_batches, self.planned_size = len(fit.train_loader), self.at_once(fit)

    def scheme(self, fit: RunningFit, loader: DataLoader[Any]) -> SamplingScheme:
        """Return how the user's loader draws, also while it is narrowed."""
        sampler, is_split = fit.users_sampler(loader, *self._narrowed.samplers_of(loader))
        scheme = check_sampler(loader, sampler, ranks=1 if is_split else fit.world_size)
        # Lightning shuffles what it splits.
        return replace(scheme, shuffle=scheme.shuffle or is_split)

    def _part_of(self, fit: RunningFit, loader: DataLoader[Any]) -> tuple[int, int]:
        """Return the number of parts that the data are split into, and the part that this rank draws."""
        own = self._narrowed.samplers_of(loader)[0]
        # The user's own may split the data over other parts than the ranks, as where some ranks share a model.
        if isinstance(own, DistributedSampler):
            return own.num_replicas, own.rank
        return fit.world_size, fit.rank

    @override
    def at_once(self, fit: RunningFit) -> int:
        loader = fit.train_loader
        batch_sampler: Any = loader.batch_sampler
        size: int = batch_sampler.batch_size
        return size * self._part_of(fit, loader)[0]

    def sampler(
        self, fit: RunningFit, loader: DataLoader[Any], subset: TrainingSubset, *, keeps_plan: bool
    ) -> CleanSubsetSampler:
        """Return what the loader is to draw from.

        Args:
            fit: that is running.
            loader: the user's.
            subset: the subset.
            keeps_plan: whether no more is drawn than was planned, as by a schedule of steps.
        """
        batch_sampler: Any = loader.batch_sampler
        norms = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in fit.model.modules())
        replicas, rank = self._part_of(fit, loader)
        size = batch_sampler.batch_size
        # A fit that goes on with batches of another size has other steps: no sample is left out for the old ones.
        is_planned = keeps_plan and size * replicas == self.planned_size
        return CleanSubsetSampler(
            self.scheme(fit, loader).restricted_to(subset.index, subset.probability, at_least=size * replicas),
            num_replicas=replicas,
            rank=rank,
            seed=self.seed,
            leave_no_single=size if norms else None,
            at_most=self.planned_batches * size * replicas if is_planned else None,
        )

    @override
    def fault_of(self, fit: RunningFit, subset: TrainingSubset, *, keeps_plan: bool) -> str:
        loader = fit.train_loader
        sampler = self.sampler(fit, loader, subset, keeps_plan=keeps_plan)
        if batches_of(fit, loader, sampler) == 0:
            return "do not fill one batch on each rank (drop_last, limit_train_batches, weights of zero)"
        if sampler.is_single:
            return "leave each rank a batch of one sample, on which batch norm cannot be trained"
        return ""

    @override
    def batches_with(self, fit: RunningFit, subset: TrainingSubset) -> int | float:
        loader = fit.train_loader
        return batches_of(fit, loader, self.sampler(fit, loader, subset, keeps_plan=False))

    @override
    def relabeling_fault(self, fit: FitContext, partition: Partition) -> str:
        return fault_of_absent(fit, partition)

    @override
    def dataset(self, fit: RunningFit) -> Any:
        return fit.train_loader.dataset

    @override
    def follow(
        self,
        fit: FitContext,
        subset: TrainingSubset,
        partition: Callable[[], Partition],
        keeps_plan: Callable[[], bool],
    ) -> None:
        self.attach(fit, subset, keeps_plan=keeps_plan)
        if subset.new_label is not None:
            self.relabeling.attach(fit, subset.new_label, lambda: partition().label)

    def attach(self, fit: RunningFit, subset: TrainingSubset, *, keeps_plan: Callable[[], bool]) -> None:
        """Draw from a subset from now on, without replacing labels.

        Args:
            fit: the running fit.
            subset: the subset.
            keeps_plan: see :meth:`sampler`; called for each loader.
        """
        if self._swap.is_attached:
            return

        def narrow(loaders: Any) -> DataLoader[Any]:
            loader = check_loader(loaders)
            # A loader that a reload has replaced is not held on to.
            self._narrowed.restore()
            sampler = self.sampler(fit, loader, subset, keeps_plan=keeps_plan())
            # Before Lightning makes an iterator, whose workers draw the first batches at once.
            sampler.set_epoch(fit.next_epoch)
            return self._narrowed.narrow(loader, sampler, remembers=subset.new_label is not None)

        self._swap.attach(fit, narrow)

    @override
    def ask_again(self, fit: RunningFit) -> None:
        self._swap.ask_again(fit)

    @override
    def detach(self, fit: RunningFit) -> None:
        self.relabeling.detach()
        self._swap.detach(fit)
        self._narrowed.restore()


def batches_of(fit: RunningFit, loader: DataLoader[Any], sampler: CleanSubsetSampler) -> int:
    """Return the number of batches per epoch for a sampler, with the batch size and drop_last of the loader."""
    batch_sampler: Any = loader.batch_sampler
    size: int = batch_sampler.batch_size
    return fit.limited_batches(len(sampler) // size if batch_sampler.drop_last else -(-len(sampler) // size))
