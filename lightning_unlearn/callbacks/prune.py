"""When to prune, and keeping the pruned neurons silent."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_unlearn.attribution import plain_name
from lightning_unlearn.callbacks.base import PartitionConsumer
from lightning_unlearn.pruning.criteria import Criterion, find_criterion
from lightning_unlearn.pruning.holding import HeldEntries, silence_state
from lightning_unlearn.pruning.masking import are_revived
from lightning_unlearn.pruning.messages import OTHER_WEIGHTS, summary_clause, warn_of_revived
from lightning_unlearn.pruning.run import PruneSettings, find_sites, prune, report_pruning
from lightning_unlearn.pruning.sites import (
    check_layer,
)
from lightning_unlearn.pruning.smaller import (
    refuse_unshrinkable,
    say_not_written,
    say_of_older_file,
    write_shrunk,
)
from lightning_unlearn.pruning.state import PruneState
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import settings_of
from lightning_unlearn.shrinking.cut import require_torch_pruning
from lightning_unlearn.trainer.strategies import refuse_where_sharded
from lightning_unlearn.utilities.checks import check_names, check_number, check_path, check_text
from lightning_unlearn.utilities.sharding import reshard


class SensitivityPruneCallback(PartitionConsumer):
    """Prunes the neurons that are significantly more active on noisy samples (RLAP, step 4).

    Once the partition is computed, it streams the activations of the layers over the training set, regresses the
    probability of being clean on them, and prunes the neurons that are significantly more active on noisy samples,
    worst first, up to ``amount``: weight row, bias, and scale and shift of a following norm. Pruned neurons stay
    exactly zero during further training and in every checkpoint, which loads with ``strict=True`` into the plain
    module. If no neuron is significant, none is pruned.

    Before the first step and at pruning it verifies in the running module that pruned neurons output zero, however
    the weights are computed. If something else writes to the weights later, they are zeroed again and a warning is
    logged.

    A guard prunes in steps and rolls back a step after which validation accuracy (without validation data, the loss on
    held-out confident clean samples) is worse than before pruning by more than a tolerance.

    With the recipe ``"rlap"`` the regression is the paper's: least squares of the two clusters, neurons of largest
    magnitude of either sign, without a test.

    Args:
        layer: dotted path of the Linear or convolution to prune, or a list of paths. A convolution is pruned by
            channel. In a residual branch, the contribution of the branch is pruned. By default the neurons are the
            inputs of the last Linear with an output per class that ``forward`` calls: its columns are pruned, and the
            neurons of the layer that feeds it if there are only element-wise functions and pooling between the two.
        amount: maximum share of each layer's active neurons to prune, in (0, 1), over all rounds of partition and
            pruning. Neurons with a constant activation do not count.
        criterion: ``"sensitivity"``, or a baseline, which always prunes ``amount``: ``"random"``; ``"magnitude"`` of
            the weights, smallest first; or the ratio of importance on suspect to clean samples, largest first
            (``"mean_abs_ratio"``, ``"rms_ratio"``, ``"std_ratio"``, ``"frequency_ratio"`` of activations, ``"taylor"``
            and ``"hessian"`` of the loss of the given labels). Pass an object to change its settings, such as
            ``Sensitivity(fdr_level=None)``, or your own: see :mod:`lightning_unlearn.pruning.criteria`.
        max_val_drop: maximum drop of validation accuracy (0.01 is one point), or rise of the loss in nats. None
            disables the guard: nothing is measured or rolled back.
        shrink_to: file to which rank 0 writes the final network without its pruned neurons at the end of the fit: fewer
            parameters, same outputs. :func:`~lightning_unlearn.shrinking.load_shrunk` reads it;
            ``lightning-unlearn shrink`` does the same for any checkpoint. If no neuron was pruned or can be cut out,
            no file is written, and a warning names an existing file of an earlier fit.

    Raises:
        ValueError: for arguments out of range, here; for a layer that is unknown or cannot be pruned, when the fit is
            set up; for one that is not reached, or too small for ``amount``, or with ``shrink_to`` where no neuron
            can be cut out of the layers (behind a residual sum), when training starts.
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
        max_val_drop: float | None = 0.01,
        shrink_to: str | PathLike[str] | None = None,
    ) -> None:
        self.layer = _checked_layer(layer)
        self.amount = check_number("amount", amount, above=0, below=1, meaning="the share of neurons to prune")
        self._criterion = find_criterion(criterion)
        self.criterion = criterion if isinstance(criterion, Criterion) else self._criterion.name
        self.max_val_drop = None
        if max_val_drop is not None:
            self.max_val_drop = check_number("max_val_drop", max_val_drop, least=0, meaning="or None for no guard")
        self.shrink_to = None if shrink_to is None else check_path("shrink_to", shrink_to, "a file to write")
        self.reset()

    @override
    def reset(self) -> None:
        super().reset()
        self._state = PruneState()
        self._held = HeldEntries()
        self._has_said_revived = False

    @property
    def masks(self) -> tuple[NeuronMask, ...]:
        """Which neurons are kept, for each layer, in the order in which ``forward`` calls them.

        In a dry run, which would be kept.

        Raises:
            RuntimeError: before there are any, saying when there will be, or if the partition was not acted on.
        """
        if not self._state.masks:
            if self._state.epoch >= 0:
                raise RuntimeError("No mask: the partition was not applied, so no neuron was pruned.")
            when = self.when_computed()
            raise RuntimeError(f"No mask yet: neurons are pruned {when}.")
        return tuple(self._state.masks)

    @property
    def mask(self) -> NeuronMask:
        """The mask of the one layer; raises like :attr:`masks`, and where there are several."""
        masks = self.masks
        if len(masks) > 1:
            names = ", ".join(repr(mask.layer) for mask in masks)
            raise RuntimeError(f"There are {len(masks)} masks, for layers {names}: use .masks.")
        return masks[0]

    @property
    def sensitivity(self) -> Tensor:
        """(D,) float32, standardized coefficient of every neuron of the one layer; raises like :attr:`mask`."""
        return self.mask.sensitivity

    def target_layer(self) -> str:
        """Return the dotted path of the layer that is or will be pruned: the first whose parameters are touched."""
        if not self._state.sites:
            raise RuntimeError("The layer to prune is known when training starts.")
        return self._state.sites[0].target

    def zero_pruned(self) -> None:
        """Set pruned neurons to zero again, in averages too; for callers that have just changed weights."""
        self._held.zero_all(self.fit)

    @override
    def summary_clause(self) -> str:
        """Return what was done, in one clause; empty where no neuron was to be pruned."""
        return summary_clause(self._state)

    @override
    def settings(self) -> dict[str, Any]:
        return settings_of(self, criterion=self.criterion if isinstance(self.criterion, str) else repr(self.criterion))

    @override
    def provenance_entry(self, partition: Partition) -> dict[str, Any]:
        pruned = {} if self._state.is_proposal else {m.layer: m.pruned_indices() for m in self._state.masks}
        return {"pruned": pruned, "note": self._state.note}

    @override
    def validate_setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().validate_setup(trainer, pl_module)
        if self.shrink_to is not None:
            refuse_where_sharded(self.fit, "SensitivityPruneCallback", shrink_to=True)
            require_torch_pruning()

    @override
    def check_layers(self, pl_module: LightningModule) -> None:
        for name in self._names():
            check_layer(pl_module, name, self.amount)

    def _names(self) -> list[str]:
        names = [self.layer] if isinstance(self.layer, str) else list(self.layer or ())
        return [plain_name(name) for name in names]

    @override
    def validate_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Also for a source that has not looked at a batch since a resume, so that it learns what its labels mean.
        first, batch = self.fit.probe()
        if not self._state.masks:
            sites = find_sites(self.fit, self._settings(), (first, batch))
            self._state = replace(self._state, sites=sites)
        if self.shrink_to is not None:
            refuse_unshrinkable(self.fit, self._state.sites, batch.x, self.shrink_to)
            say_of_older_file(self.fit, self.shrink_to, writes=not self._is_dry_run)

    def _settings(self) -> PruneSettings:
        return PruneSettings(self._names(), self.amount, self._criterion, self.max_val_drop)

    @override
    def act_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.get_mask(trainer, pl_module)

    def get_mask(self, trainer: Trainer, pl_module: LightningModule) -> NeuronMask | None:
        """Return the (first) mask, made now if it is due; None if it is not due or nothing is pruned.

        Every partition of the fit is acted on once. What was pruned stays so, and counts in ``amount``.
        """
        partition = self.source.get_partition(trainer, pl_module)
        # What a dry run has proposed is still to be done in a fit that acts.
        if self._state.is_proposal and not self._is_dry_run:
            self._state = PruneState(sites=self._state.sites, epoch=0)
        if partition is not None and partition.epoch > self._state.epoch:
            if partition.is_actionable:
                if not self._state.sites:
                    self.validate_data(trainer, pl_module)
                with self.timed():
                    self._prune(trainer, pl_module, partition)
            self._state = replace(self._state, epoch=partition.epoch)
        return self._state.masks[0] if self._state.holds else None

    @override
    def resume(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The weights come from the checkpoint already pruned, and are to stay so.
        if self._state.holds:
            self.refuse_dry_run()
            self._held.take(self._state.entries(pl_module))
            self.confirm(trainer, pl_module)

    @override
    def confirm(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set pruned entries to zero again where something else changed them, and log it once."""
        if not self._held:
            return
        reshard(pl_module)
        if self._held.confirm(self.fit, self._state.entries(pl_module)):
            return
        if not self._has_said_revived:
            self._has_said_revived = True
            warn_of_revived(self._state)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Whatever was done to the weights meanwhile, no step is trained with; without a look, which takes time.
        self._held.zero_parameters()

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
        if not self._state.holds or not self._state.count:
            say_not_written(self.fit, self.shrink_to, "No neurons pruned")
            return
        _, batch = self.fit.probe()
        with self.timed():
            write_shrunk(self.fit, batch.x, self.shrink_to)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.confirm(trainer, pl_module)
        super().teardown(trainer, pl_module, stage)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.confirm(trainer, pl_module)
        if self._held:
            # Most often these are the weights themselves; another callback may have put copies there.
            silence_state(pl_module, checkpoint["state_dict"], self._state.entries(pl_module))

    def _warn_of_other_weights(self, pl_module: LightningModule) -> None:
        """Say where a test is of other weights than those that the fit has pruned, as of an earlier checkpoint."""
        if self._fitting or not self._state.holds:
            return
        try:
            is_revived = are_revived(self._state.entries(pl_module))
        except ValueError:
            is_revived = True  # another model, without such a layer or with one of another size
        if is_revived:
            rank_zero_warn(OTHER_WEIGHTS)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Here, so that an optimizer that another callback has made meanwhile is watched too.
        self._held.watch(optimizer, trainer.optimizers)

    @override
    def restore_trainer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # An optimizer that calls its closure after a change, as LBFGS does, may have been stopped in between.
        self._held.zero_parameters()
        self._held.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives, 9 bytes per neuron."""
        return {"version": self.state_version, **self._state.state_dict()}

    @property
    @override
    def has_result(self) -> bool:
        return bool(self._state.masks)

    @override
    def load_fields(self, state: dict[str, Any]) -> None:
        self._state = PruneState.from_state_dict(state)

    def _prune(self, trainer: Trainer, pl_module: LightningModule, partition: Partition) -> None:
        settings = self._settings()
        result = prune(self.fit, partition, self._state, settings, self._held)
        # After all that may fail, and all at once.
        self._state = result.state
        report_pruning(self.fit, result, settings)


def _checked_layer(layer: Any) -> str | list[str] | None:
    if layer is None:
        return None
    if isinstance(layer, str):
        return check_text("layer", layer, "the dotted path of a layer, or a list of them")
    names = check_names("layer", layer, "dotted paths of layers")
    if not names:
        raise ValueError(f"Expected layer to name at least one layer, and each once, but got {layer}.")
    return [check_text("layer", name, "a list of dotted paths of layers") for name in names]
