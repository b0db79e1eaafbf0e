"""When to prune, and keeping the pruned neurons silent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_unlearn.attribution import ForwardTrace, plain_name
from lightning_unlearn.callbacks.base import PartitionConsumer
from lightning_unlearn.functional.selection import share_of
from lightning_unlearn.pruning.criteria import Criterion, find_criterion
from lightning_unlearn.pruning.guard import Gauge, Outcome, make_gauge, prune_in_steps
from lightning_unlearn.pruning.holding import HeldEntries, silence_state
from lightning_unlearn.pruning.masking import PrunedEntries, are_revived
from lightning_unlearn.pruning.ranking import Ranking, Subject, rank_neurons
from lightning_unlearn.pruning.silence import find_silent
from lightning_unlearn.pruning.sites import (
    PruneSite,
    check_layer,
    check_trained,
    default_site,
    named_site,
)
from lightning_unlearn.pruning.smaller import refuse_unshrinkable, write_shrunk
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import copied, settings_of
from lightning_unlearn.shrinking.cut import require_torch_pruning
from lightning_unlearn.trainer.context import IndexedBatch, probe
from lightning_unlearn.trainer.fit_loop import log_values
from lightning_unlearn.trainer.loggers import log_masks
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.trainer.sample_rows import locate_samples, no_rows
from lightning_unlearn.trainer.strategies import refuse_where_sharded
from lightning_unlearn.trainer.weight_averages import averaged_parts
from lightning_unlearn.utilities.checks import check_flag, check_names, check_number, check_path, check_text
from lightning_unlearn.utilities.sharding import reshard

_NOT_SILENT = (
    "Zeroing the weights of its neurons would not silence them, since forward computes them from more than the"
    " layer's weight and bias (an adapter such as LoRA, a quantized weight); merge or remove that, or name another"
    " layer to prune."
)


class SensitivityPruneCallback(PartitionConsumer):
    """Prunes the neurons whose activations tell noise from clean samples (RLAP, step 4).

    When the partition has been drawn it streams the layers' activations over the training set, regresses the
    probability of being clean on them, and prunes, worst first and up to a share, the neurons that are significantly
    more active for noise: weight row, bias, and scale and shift of a norm that follows. They stay exactly zero through
    all further training, and in every checkpoint, which loads with ``strict=True`` into the plain module. Where none is
    significant, none is pruned.

    That they are silent is seen in the module as it runs, before the first step and when they are pruned, whatever its
    weights are computed from. Where something else writes to the weights later, they are zeroed again, which is said.

    A guard prunes in steps and takes back what hurts: a step after which validation accuracy (without validation data,
    the loss on held-back samples that are surely clean) is worse than before the pruning by more than a tolerance.

    With the recipe ``"rlap"`` the regression is the paper's: least squares of the two clusters, neurons of largest
    magnitude, whatever their sign, without a test.

    Args:
        layer: dotted path of the Linear or convolution to prune, a convolution by channel; or several of them. Inside a
            residual branch, what is pruned is the branch's contribution. By default the neurons are the inputs of the
            last Linear with an output per class that ``forward`` calls: its columns are pruned, and with them the
            neurons of the layer that feeds it, where that is one layer with nothing but element-wise functions and
            pooling between.
        amount: share of each layer's live neurons to prune at most, in (0, 1), over all rounds of partition and
            pruning; dead neurons, which are constant, do not count.
        criterion: ``"sensitivity"``, or one to compare it with, which prunes ``amount`` in any case: ``"random"``;
            ``"magnitude"`` of the weights, smallest first; the importance for suspect samples over that for clean ones
            (``"mean_abs_ratio"``, ``"rms_ratio"``, ``"std_ratio"``, ``"frequency_ratio"`` of activations, ``"taylor"``
            and ``"hessian"`` of the loss of the given labels), largest first. Or one with settings of its own, as
            ``Sensitivity(fdr_level=None)``, or of your own making: see :mod:`lightning_unlearn.pruning.criteria`.
        guard: whether to measure, and take back what hurts.
        max_val_drop: by how much validation accuracy may fall (0.01 is one point), or the loss rise, in nats.
        shrink_to: file to which rank 0 writes the network without its pruned neurons when the fit ends, as the weights
            are then: with fewer parameters, and the same outputs. :func:`~lightning_unlearn.shrinking.load_shrunk`
            reads it. Of another checkpoint, ``lightning-unlearn shrink`` makes one.

    Raises:
        ValueError: for arguments out of range, here; for a layer that is unknown or cannot be pruned, when the fit is
            set up; for one that is not reached, or too small for ``amount``, when training starts.
        MisconfigurationException: without an AttributionPartitionCallback beside it, or with ``shrink_to`` where ranks
            hold parts of the weights, when the fit is set up.
        ImportError: with ``shrink_to``, without the package torch-pruning, when the fit is set up.

    Example:
        >>> SensitivityPruneCallback(["fc1", "fc2"], criterion="taylors")
        Traceback (most recent call last):
        ValueError: Expected criterion to be one of 'sensitivity', ... Did you mean 'taylor'?
    """

    state_version = 2

    def __init__(
        self,
        layer: str | list[str] | None = None,
        *,
        amount: float = 0.15,
        criterion: str | Criterion = "sensitivity",
        guard: bool = True,
        max_val_drop: float = 0.01,
        shrink_to: str | PathLike[str] | None = None,
    ) -> None:
        self.layer = _checked_layer(layer)
        self.amount = check_number("amount", amount, above=0, below=1, meaning="the share of neurons to prune")
        self._criterion = find_criterion(criterion)
        self.criterion = criterion if isinstance(criterion, Criterion) else self._criterion.name
        self.guard = check_flag("guard", guard)
        self.max_val_drop = check_number("max_val_drop", max_val_drop, least=0)
        self.shrink_to = None if shrink_to is None else check_path("shrink_to", shrink_to, "a file to write")
        self.reset()

    @override
    def reset(self) -> None:
        super().reset()
        # Resolved in begin, in the order in which forward calls them.
        self._sites: list[PruneSite] = []
        self._masks: list[NeuronMask] = []
        # Of each layer, how many neurons were live when it was first pruned: what ``amount`` is a share of.
        self._live: list[int] = []
        # Of the partition that was acted upon last; -1 before the first.
        self._epoch = -1
        # In a dry run: the masks say what would be pruned, and nothing is.
        self._is_proposal = False
        self._note = ""
        self._held = HeldEntries()
        self._has_said_revived = False

    @property
    def masks(self) -> tuple[NeuronMask, ...]:
        """Which neurons are kept, for each layer, in the order in which ``forward`` calls them.

        In a dry run, which would be kept.

        Raises:
            RuntimeError: before there are any, saying when there will be, or if the partition was not acted upon.
        """
        if not self._masks:
            if self._epoch >= 0:
                raise RuntimeError("There is no mask: the partition was not acted upon, so no neuron was pruned.")
            when = self.when_drawn()
            raise RuntimeError(f"There is no mask yet: neurons are pruned {when}.")
        return tuple(self._masks)

    @property
    def mask(self) -> NeuronMask:
        """The mask of the one layer; raises like :attr:`masks`, and where there are several."""
        masks = self.masks
        if len(masks) > 1:
            names = ", ".join(repr(mask.layer) for mask in masks)
            raise RuntimeError(f"There are {len(masks)} masks, of the layers {names}: use .masks.")
        return masks[0]

    @property
    def sensitivity(self) -> Tensor:
        """(D,) float32, standardized coefficient of every neuron of the one layer; raises like :attr:`mask`."""
        return self.mask.sensitivity

    def target_layer(self) -> str:
        """Dotted path of the layer that is or will be pruned: the first whose parameters are touched."""
        if not self._sites:
            raise RuntimeError("The layer to prune is known when training starts.")
        return self._sites[0].target

    def silence(self) -> None:
        """Sets what belongs to pruned neurons to zero again, for who has just changed weights."""
        self._held.zero_parameters()

    @override
    def describe(self) -> str:
        """What was done, in one clause; empty where no neuron was to be pruned."""
        if not any(len(mask.pruned_indices()) for mask in self._masks) and not self._note:
            return ""
        verb = "would prune" if self._is_proposal else "pruned"
        counts = [f"{len(mask.pruned_indices())} of {len(mask.keep)} neurons of '{mask.layer}'" for mask in self._masks]
        return f"{verb} {' and '.join(counts)}{f' ({self._note})' if self._note else ''}"

    @override
    def settings(self) -> dict[str, Any]:
        return settings_of(self, criterion=self.criterion if isinstance(self.criterion, str) else repr(self.criterion))

    @override
    def record(self, partition: Partition) -> dict[str, Any]:
        pruned = {} if self._is_proposal else {mask.layer: mask.pruned_indices() for mask in self._masks}
        return {"pruned": pruned, "note": self._note}

    @override
    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().check(trainer, pl_module)
        if self.shrink_to is not None:
            refuse_where_sharded(trainer, "SensitivityPruneCallback", shrink_to=True)
            require_torch_pruning()

    @override
    def check_layers(self, pl_module: LightningModule) -> None:
        for name in self._names():
            check_layer(pl_module, name, self.amount)

    def _names(self) -> list[str]:
        names = [self.layer] if isinstance(self.layer, str) else list(self.layer or ())
        return [plain_name(name) for name in names]

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Also for a source that has not looked at a batch since a resume, so that it learns what its labels mean.
        first, batch = probe(trainer, pl_module, self.source)
        if self.shrink_to is not None:
            refuse_unshrinkable(trainer, pl_module, batch.x, self.shrink_to)
        if self._masks:
            return

        def trace() -> ForwardTrace:
            return probe(trainer, pl_module, self.source)[0]

        if self.layer is None:
            sites = [default_site(pl_module, self.amount, first)]
        else:
            named = {name: named_site(pl_module, name, trace, first) for name in self._names()}
            sites = [named[call.name] for call in first.calls if call.name in named]
        check_trained(sites, averaged_parts(pl_module))
        sites = self._located(trainer, pl_module, batch, sites)
        # Every other neuron, so that an operation that mixes neurons shows too.
        every_other = [torch.arange(0, site.width(pl_module), 2) for site in sites]
        found = self._verified(trainer, pl_module, sites, every_other)
        for site, verified in zip(sites, found, strict=True):
            if verified is None:
                raise ValueError(
                    f"SensitivityPruneCallback cannot prune layer '{site.consumer or site.target}'. {_NOT_SILENT}"
                )
        self._sites = [site for site in found if site is not None]

    def _located(
        self, trainer: Trainer, pl_module: LightningModule, batch: IndexedBatch, sites: list[PruneSite]
    ) -> list[PruneSite]:
        """The sites, with the dimension of their activations that counts samples."""
        points = locate_samples(trainer, pl_module, self.source, batch, [site.point for site in sites])
        for site, point in zip(sites, points, strict=True):
            if point is None:
                said = no_rows(site.point, len(batch.index))
                raise ValueError(f"SensitivityPruneCallback cannot prune layer '{site.target}'. {said}")
        return [replace(site, samples=point.samples) for site, point in zip(sites, points, strict=True) if point]

    @override
    def advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pull_mask(trainer, pl_module)

    def pull_mask(self, trainer: Trainer, pl_module: LightningModule) -> NeuronMask | None:
        """The mask (of several layers, the first), made now if it is due; None if it is not due or nothing is pruned.

        Every partition of the fit is acted upon once. What was pruned stays so, and counts in ``amount``.
        """
        partition = self.source.pull_partition(trainer, pl_module)
        # What a dry run has proposed is still to be done in a fit that acts.
        if self._is_proposal and not self._is_dry_run:
            self._forget_proposal()
        if partition is not None and partition.epoch > self._epoch:
            if partition.is_actionable:
                if not self._sites:
                    self.begin(trainer, pl_module)
                with self.timed():
                    self._prune(trainer, pl_module, partition)
            self._epoch = partition.epoch
        return self._masks[0] if self._holds() else None

    def _forget_proposal(self) -> None:
        self._masks, self._live, self._note, self._epoch, self._is_proposal = [], [], "", 0, False

    @override
    def resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The weights come from the checkpoint already pruned, and are to stay so.
        if self._holds():
            self.refuse_dry_run()
            self._held.take(self._entries(pl_module, self._sites, self._masks))
            self.confirm(trainer, pl_module)

    @override
    def confirm(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets to zero again what something else has brought back, and says so once."""
        if not self._held:
            return
        reshard(pl_module)
        if self._held.confirm(trainer, pl_module, self._entries(pl_module, self._sites, self._masks)):
            return
        if not self._has_said_revived:
            self._has_said_revived = True
            names = " and ".join(f"'{mask.layer}'" for mask in self._masks)
            rank_zero_warn(
                f"Pruned neurons of {names} had weights other than zero again: something else writes to them, such as a"
                " callback that loads or averages weights. They are zeroed now, and whenever it happens during the fit."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Whatever was done to the weights meanwhile, no step is trained with; without a look, which takes time.
        self.silence()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.confirm(trainer, pl_module)
        super().on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.confirm(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.confirm(trainer, pl_module)
        self._warn_of_other_weights(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_of_other_weights(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warn_of_other_weights(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.confirm(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.confirm(trainer, pl_module)
        if self.shrink_to is None:
            return
        if not self._holds() or all(bool(mask.keep.all()) for mask in self._masks):
            rank_zero_info(f"No neuron is pruned, so {self.shrink_to} is not written.")
            return
        _, batch = probe(trainer, pl_module, self.source)
        with self.timed():
            write_shrunk(trainer, pl_module, batch.x, self.shrink_to)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.confirm(trainer, pl_module)
        super().teardown(trainer, pl_module, stage)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.confirm(trainer, pl_module)
        if self._held:
            # Most often these are the weights themselves; another callback may have put copies there.
            silence_state(pl_module, checkpoint["state_dict"], self._entries(pl_module, self._sites, self._masks))

    def _warn_of_other_weights(self, pl_module: LightningModule) -> None:
        """Says where a test is of other weights than those that the fit has pruned, as of an earlier checkpoint."""
        if self._fitting or not self._holds():
            return
        try:
            is_revived = are_revived(self._entries(pl_module, self._sites, self._masks))
        except ValueError:
            is_revived = True  # another model, without such a layer or with one of another size
        if is_revived:
            rank_zero_warn(
                "The weights in use are not those that SensitivityPruneCallback pruned (a checkpoint from before the"
                " partition, for example), so its masks do not describe them."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Here, so that an optimizer that another callback has made meanwhile is watched too.
        self._held.watch(optimizer, trainer.optimizers)

    @override
    def undo(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An optimizer that calls its closure after a change, as LBFGS does, may have been stopped in between.
        self._held.zero_parameters()
        self._held.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives, 9 bytes per neuron."""
        return {
            "version": self.state_version,
            "epoch": self._epoch,
            "is_proposal": self._is_proposal,
            "note": self._note,
            "sites": [asdict(site) for site in self._sites],
            "live": list(self._live),
            "masks": [
                {
                    "layer": mask.layer,
                    "keep": copied(mask.keep),
                    "sensitivity": copied(mask.sensitivity),
                    "standard_error": copied(mask.standard_error),
                }
                for mask in self._masks
            ],
        }

    @property
    @override
    def has_acted(self) -> bool:
        return bool(self._masks)

    @override
    def restore(self, state: dict[str, Any]) -> None:
        self._epoch = state["epoch"]
        self._is_proposal = state["is_proposal"]
        self._note = state["note"]
        self._sites = [PruneSite(**site) for site in state["sites"]]
        self._live = list(state["live"])
        self._masks = [NeuronMask(**copied(mask)) for mask in state["masks"]]

    def _prune(self, trainer: Trainer, pl_module: LightningModule, partition: Partition) -> None:
        gauge, started = None, time.perf_counter()
        if self.guard:
            gauge = make_gauge(trainer, pl_module, self.source, partition, self.max_val_drop)
        guard = time.perf_counter() - started
        rankings = self._rank(trainer, pl_module, partition, gauge)
        lives = self._live or [ranking.live for ranking in rankings]
        proposal = [
            ranking.order[: max(0, share_of(self.amount, live) - self._count_pruned(at))]
            for at, (ranking, live) in enumerate(zip(rankings, lives, strict=True))
        ]
        sites, proposal = self._audible(trainer, pl_module, proposal)
        outcome = Outcome(proposal)
        if gauge is not None and any(len(neurons) for neurons in proposal):
            steps_started = time.perf_counter()
            outcome = prune_in_steps(pl_module, sites, proposal, gauge)
            guard += time.perf_counter() - steps_started
        masks = [
            self._mask_of(at, sites[at], ranking, kept)
            for at, (ranking, kept) in enumerate(zip(rankings, outcome.kept, strict=True))
        ]
        if not self.source.is_dry_run:
            self._held.hold(trainer, pl_module, self._entries(pl_module, sites, masks))
        # After all that may fail, and all at once.
        self._live, self._sites, self._epoch, self._masks = lives, sites, partition.epoch, masks
        self._is_proposal = self.source.is_dry_run
        self._report(pl_module, rankings, proposal, outcome, gauge)
        pruning = time.perf_counter() - started - guard
        log_values(pl_module, {"unlearn/seconds_pruning": pruning, "unlearn/seconds_guard": guard})
        log_masks(pl_module, self._masks)

    def _rank(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        partition: Partition,
        gauge: Gauge | None,
    ) -> list[Ranking]:
        weight = self.source.sample_weight
        weight = torch.ones(len(partition)) if weight is None else weight.clone()
        if gauge is not None:
            weight[gauge.held] = 0
        gone = [~mask.keep for mask in self._masks] if self._holds() else [None] * len(self._sites)
        subject = Subject(partition, weight, gone)
        return rank_neurons(trainer, pl_module, self.source, self._sites, self._criterion, subject)

    def _holds(self) -> bool:
        """Whether neurons have been pruned before, and not only proposed."""
        return bool(self._masks) and not self._is_proposal

    def _count_pruned(self, at: int) -> int:
        return len(self._masks[at].pruned_indices()) if self._holds() else 0

    def _mask_of(self, at: int, site: PruneSite, ranking: Ranking, pruned: Tensor) -> NeuronMask:
        """The mask with what was pruned before; of that, the score is the one that it was pruned for."""
        keep = torch.ones(len(ranking.score), dtype=torch.bool)
        score, error = ranking.score, ranking.standard_error
        if self._holds():
            before = self._masks[at]
            keep = before.keep.clone()
            score = torch.where(keep, score, before.sensitivity)
            if error is not None and before.standard_error is not None:
                error = torch.where(keep, error, before.standard_error)
        keep[pruned] = False
        return NeuronMask(site.target, keep, score, error)

    def _report(
        self,
        pl_module: LightningModule,
        rankings: Sequence[Ranking],
        proposal: Sequence[Tensor],
        outcome: Outcome,
        gauge: Gauge | None,
    ) -> None:
        for mask, ranking, proposed, live in zip(self._masks, rankings, proposal, self._live, strict=True):
            if share_of(self.amount, live) == 0:
                rank_zero_warn(
                    f"No neuron was pruned: amount={self.amount} of the {live} neurons of '{mask.layer}' whose"
                    " activation varies is less than one."
                )
            elif len(ranking.order) == 0:
                level = getattr(self._criterion, "fdr_level", None)
                rank_zero_info(
                    f"No neuron of '{mask.layer}' is pruned: of its {ranking.live} live neurons, none is"
                    f" {'' if level is None else 'significantly '}more active for noise"
                    f"{'' if level is None else f' (at a level of {level})'}."
                )
            elif len(proposed):
                rank_zero_info(
                    f"{len(ranking.order)} of the {ranking.live} live neurons of '{mask.layer}' may be pruned"
                    f" ({self._criterion.name}); proposed, the worst first: {len(proposed)} (amount={self.amount})."
                )
        proposed_all = sum(len(neurons) for neurons in proposal)
        if outcome.rolled_back:
            self._note = f"{outcome.rolled_back} of {proposed_all} proposed were rolled back: {outcome.reason}"
        elif gauge is not None and proposed_all:
            self._note = gauge.between(outcome.after)
        if proposed_all:
            done = self.describe()
            rank_zero_info(f"Dry run: {done}." if self._is_proposal else f"{done[:1].upper()}{done[1:]}.")
            pruned = sum(len(mask.pruned_indices()) for mask in self._masks)
            log_values(pl_module, {"unlearn/pruned_neurons": 0.0 if self._is_proposal else float(pruned)})

    def _audible(
        self, trainer: Trainer, pl_module: LightningModule, proposal: list[Tensor]
    ) -> tuple[list[PruneSite], list[Tensor]]:
        """The sites, and what to prune at each: nothing where it would still be heard, as it was not in the beginning.

        Such as where an adapter has been put beside a layer while it was trained.
        """
        if not any(len(neurons) for neurons in proposal):
            return self._sites, proposal
        found = self._verified(trainer, pl_module, self._sites, proposal)
        for site, verified in zip(self._sites, found, strict=True):
            if verified is None:
                rank_zero_warn(f"No neuron of '{site.target}' is pruned. {_NOT_SILENT}")
        sites = [verified or site for site, verified in zip(self._sites, found, strict=True)]
        return sites, [n if verified else n[:0] for n, verified in zip(proposal, found, strict=True)]

    def _verified(
        self, trainer: Trainer, pl_module: LightningModule, sites: Sequence[PruneSite], neurons: Sequence[Tensor]
    ) -> list[PruneSite | None]:
        """The sites at which these neurons fall silent when they are pruned; None for one that does not.

        Where something adds to the head's inputs in between, such as a residual connection, zeros in the rows of the
        layer that feeds it do not silence them; then the columns of the head alone are pruned, which does.
        """
        found: list[PruneSite | None] = list(self._silent(trainer, pl_module, sites, neurons))
        for at, site in enumerate(sites):
            if found[at] is None and site.consumer is not None and site.layer is not None:
                alone = replace(site, layer=None, norm=None)
                found[at] = self._silent(trainer, pl_module, [alone], [neurons[at]])[0]
        return found

    def _silent(
        self, trainer: Trainer, pl_module: LightningModule, sites: Sequence[PruneSite], neurons: Sequence[Tensor]
    ) -> list[PruneSite | None]:
        found = find_silent(pl_module, sites, neurons, lambda: probe(trainer, pl_module, self.source))
        # Augmentation may show each rank another batch.
        agreed = [trainer.strategy.reduce_boolean_decision(silent, all=True) for silent in found]
        return [site if silent else None for site, silent in zip(sites, agreed, strict=True)]

    def _entries(
        self, model: torch.nn.Module, sites: Sequence[PruneSite], masks: Sequence[NeuronMask]
    ) -> list[PrunedEntries]:
        for site, mask in zip(sites, masks, strict=True):
            if (width := site.width(model)) != len(mask.keep):
                raise ValueError(
                    f"Expected layer '{site.target}', of which SensitivityPruneCallback has pruned neurons, to keep its"
                    f" {len(mask.keep)} neurons until the fit has ended, but it has {width} now; replace layers before"
                    " the fit, or after it."
                )
        return [
            entry
            for site, mask in zip(sites, masks, strict=True)
            for entry in site.entries(model, mask.pruned_indices())
        ]


def _checked_layer(layer: Any) -> str | list[str] | None:
    if layer is None:
        return None
    if isinstance(layer, str):
        return check_text("layer", layer, "the dotted path of a layer, or a list of them")
    names = check_names("layer", layer, "dotted paths of layers")
    if not names:
        raise ValueError(f"Expected layer to name at least one layer, and each once, but got {layer}.")
    return [check_text("layer", name, "a list of dotted paths of layers") for name in names]
