"""The user's train loader, which draws from a subset while fine-tuning goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_unlearn.data.loaders import check_loader
from lightning_unlearn.data.sampling_scheme import Drawing
from lightning_unlearn.data.subset_sampler import (
    CleanSubsetSampler,
    SamplerSwap,
    batch_sampler_error,
    check_sampler,
)
from lightning_unlearn.finetuning.relabel import Relabeling
from lightning_unlearn.finetuning.training_subset import TrainingSubset
from lightning_unlearn.trainer.fit_loop import limited_batches, next_epoch
from lightning_unlearn.trainer.scoring_loader import train_loader
from lightning_unlearn.trainer.train_data import TrainDataSwap, users_sampler


class SubsetLoader:
    """Lets the loader of a fit draw from a subset, in the user's way, and gives it back.

    Attributes:
        seed: of the order in which the subset is drawn.
        planned_batches: batches of the first epoch on a subset, for which a schedule of steps may be planned.
        planned_size: how many samples of all ranks were a step then.
        relabeling: of the batches, where labels are replaced.
    """

    def __init__(self) -> None:
        self._swap, self._narrowed, self.relabeling = TrainDataSwap(), SamplerSwap(), Relabeling()
        self.reset()

    def reset(self) -> None:
        """Forgets an earlier fit."""
        self.seed = 0
        self.forget_plan()

    def begin(self, trainer: Trainer) -> None:
        """Looks at the loader before the first step.

        Raises:
            TypeError: for a loader that cannot be narrowed.
        """
        loader = train_loader(trainer)
        seed = self.drawing(trainer, loader).seed
        # Without one of the user's, that which Lightning gives its own samplers.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        with isolate_rng():
            fault = batch_sampler_error(loader)
        if fault:
            raise TypeError(fault)

    def plan(self, trainer: Trainer) -> None:
        """Notes for how many batches of which size a schedule of steps is planned."""
        self.planned_batches, self.planned_size = len(train_loader(trainer)), self.at_once(trainer)

    def forget_plan(self) -> None:
        """As if there had been none."""
        self.planned_batches = self.planned_size = 0

    def drawing(self, trainer: Trainer, loader: DataLoader[Any]) -> Drawing:
        """How the user's loader draws, also while it is narrowed."""
        sampler, is_split = users_sampler(trainer, loader, *self._narrowed.samplers_of(loader))
        drawing = check_sampler(loader, sampler, ranks=1 if is_split else trainer.world_size)
        # Lightning shuffles what it splits.
        return replace(drawing, shuffle=drawing.shuffle or is_split)

    def _part_of(self, trainer: Trainer, loader: DataLoader[Any]) -> tuple[int, int]:
        """Into how many parts the data are split, and which of them this rank draws."""
        own = self._narrowed.samplers_of(loader)[0]
        # The user's own may split the data over other parts than the ranks, as where some ranks share a model.
        if isinstance(own, DistributedSampler):
            return own.num_replicas, own.rank
        return trainer.world_size, trainer.global_rank

    def at_once(self, trainer: Trainer) -> int:
        """How many samples the ranks' batches hold together."""
        loader = train_loader(trainer)
        batch_sampler: Any = loader.batch_sampler
        size: int = batch_sampler.batch_size
        return size * self._part_of(trainer, loader)[0]

    def sampler(
        self, trainer: Trainer, loader: DataLoader[Any], draw: TrainingSubset, *, keeps_plan: bool
    ) -> CleanSubsetSampler:
        """What the loader is to draw from.

        Args:
            trainer: of the fit.
            loader: the user's.
            draw: the subset.
            keeps_plan: whether no more is drawn than was planned, as by a schedule of steps.
        """
        batch_sampler: Any = loader.batch_sampler
        norms = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in trainer.lightning_module.modules())
        replicas, rank = self._part_of(trainer, loader)
        size = batch_sampler.batch_size
        # A fit that goes on with batches of another size has other steps: no sample is left out for the old ones.
        is_planned = keeps_plan and size * replicas == self.planned_size
        return CleanSubsetSampler(
            self.drawing(trainer, loader).narrowed(draw.index, draw.probability, at_least=size * replicas),
            num_replicas=replicas,
            rank=rank,
            seed=self.seed,
            leave_no_single=size if norms else None,
            at_most=self.planned_batches * size * replicas if is_planned else None,
        )

    def fault_of(self, trainer: Trainer, draw: TrainingSubset, *, keeps_plan: bool) -> str:
        """Why a subset cannot be trained on, in the words that follow "samples"; empty if it can."""
        loader = train_loader(trainer)
        sampler = self.sampler(trainer, loader, draw, keeps_plan=keeps_plan)
        if batches_of(trainer, loader, sampler) == 0:
            return "do not fill one batch on each rank (drop_last, limit_train_batches, weights of zero)"
        if sampler.is_single:
            return "leave each rank a batch of one sample, on which batch norm cannot be trained"
        return ""

    def attach(self, trainer: Trainer, draw: TrainingSubset, *, keeps_plan: Callable[[], bool]) -> None:
        """Draws from a subset from now on; where labels are replaced, :attr:`relabeling` has to be attached too.

        Args:
            trainer: of the fit.
            draw: the subset.
            keeps_plan: see :meth:`sampler`; asked whenever there is a loader.
        """
        if self._swap.is_attached:
            return

        def narrow(loaders: Any) -> DataLoader[Any]:
            loader = check_loader(loaders)
            # A loader that a reload has replaced is not held on to.
            self._narrowed.restore()
            sampler = self.sampler(trainer, loader, draw, keeps_plan=keeps_plan())
            # Before Lightning makes an iterator, whose workers draw the first batches at once.
            sampler.set_epoch(next_epoch(trainer))
            return self._narrowed.narrow(loader, sampler, remembers=draw.new_label is not None)

        self._swap.attach(trainer, narrow)

    def ask_again(self, trainer: Trainer) -> None:
        """Has the loader made again, in a fit that goes on from a checkpoint."""
        self._swap.ask_again(trainer)

    def detach(self, trainer: Trainer) -> None:
        """Gives the loader back."""
        self.relabeling.detach()
        self._swap.detach(trainer)
        self._narrowed.restore()

    def state_dict(self) -> dict[str, int]:
        """Numbers."""
        return {"planned_batches": self.planned_batches, "planned_size": self.planned_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint has."""
        self.planned_batches, self.planned_size = state["planned_batches"], state.get("planned_size", 0)
        self.seed = state["seed"]


def batches_of(trainer: Trainer, loader: DataLoader[Any], sampler: CleanSubsetSampler) -> int:
    """How many batches an epoch of what a sampler draws has, cut as the loader cuts them."""
    batch_sampler: Any = loader.batch_sampler
    size: int = batch_sampler.batch_size
    return limited_batches(trainer, len(sampler) // size if batch_sampler.drop_last else -(-len(sampler) // size))
