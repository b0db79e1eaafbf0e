"""What is settled before the first step of a fit: layers, labels, a recipe that works, a person's decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_unlearn.attribution import ForwardTrace
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.data.loaders import MIN_SAMPLES
from lightning_unlearn.data.naming import files_in
from lightning_unlearn.evidence.collector import EvidenceCollector
from lightning_unlearn.evidence.keyed_collector import KeyedCollector
from lightning_unlearn.partitioning.by_key import check_reviewed, review_by_key
from lightning_unlearn.partitioning.checks import (
    attributed_point,
    check_classifies,
    check_samples_first,
    check_several_labels,
    early_points,
)
from lightning_unlearn.partitioning.messages import warn_of_probabilities
from lightning_unlearn.partitioning.probabilities import check_has_probabilities
from lightning_unlearn.partitioning.resuming import what_holds
from lightning_unlearn.partitioning.review import check_agrees, fit_to_data
from lightning_unlearn.partitioning.state import PartitionState
from lightning_unlearn.recipes import Recipe
from lightning_unlearn.recipes.registry import is_builtin
from lightning_unlearn.recipes.users import trial
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.provenance import fit_record
from lightning_unlearn.results.review_csv import Table
from lightning_unlearn.trainer.context import FitContext, IndexedBatch
from lightning_unlearn.trainer.data_checks import (
    Recognized,
    check_same_labels,
    check_same_size,
    recognize_data,
    same_task,
)
from lightning_unlearn.trainer.isolation import isolate_rng
from lightning_unlearn.trainer.progress import rank_zero_info, rank_zero_warn
from lightning_unlearn.trainer.rank_checks import check_ranks
from lightning_unlearn.trainer.sample_rows import locate_samples, no_rows


def begin(
    fit: FitContext,
    asked: Any,
    state: PartitionState,
    collector: EvidenceCollector,
    table: Table | None,
    settings: Mapping[str, Any],
) -> None:
    """Run the checks that need the loaders and a forward pass, before the first step. Every rank must call it.

    Args:
        fit: the fit that starts.
        asked: object with the settings of ``AttributionPartitionCallback`` as attributes.
        state: receives the properties of the data.
        collector: starts collecting.
        table: contents of the file of decisions; None for no file.
        settings: settings of each callback of this package, by its name.
    """
    trace, first = fit.probe()
    collector.point, collector.early = choose_points(fit, trace, first, asked.recipe, asked.layer)
    state.task = same_task(state.task, fit.task_format.task)
    warn_of_probabilities(trace.output)
    if asked.keep_probabilities:
        check_has_probabilities(fit.task_format)
    if fit.keyed is None:
        _warn_where_no_round_follows(asked.every_n_epochs, state, collector)
    data = None
    if isinstance(collector, KeyedCollector):
        collector.check_first(fit, first.label.reshape(len(first.index), -1))
        _check_reviewed_by_key(fit, state, table)
    else:
        data = _recognize(fit, state, collector, table, first, verify=asked.data.verify)
    again = asked.every_n_epochs is not None and collector.trajectory is not None
    note_fit(fit, state, settings, len(collector.epochs_seen), may_be_recomputed=again)
    collector.say_what_is_lost()
    collector.start(fit, trace, first, is_before=state.partition is None)
    if collector.trajectory is not None and not is_builtin(asked.recipe):
        try_recipe(fit, asked.recipe, collector.trajectory.basis)
    if asked.judge_validation:
        _begin_validation(fit, state, collector)
    collector.start_reading(fit, trace, data, first)


def _recognize(
    fit: FitContext,
    state: PartitionState,
    collector: EvidenceCollector,
    table: Table | None,
    first: IndexedBatch,
    *,
    verify: bool,
) -> Recognized:
    """Check that the training set matches the checkpoint and the file of decisions."""
    check_ranks(fit, fit.total)
    known = collector.known_labels(fit)
    if state.partition is not None:
        known = state.partition.label.flatten()
    check_known_labels(fit, first, known)
    data = recognize_data(fit, known, state.fingerprint if verify else None)
    state.fingerprint = data.fingerprint
    take_review(fit, state, table, content=verify)
    remember_files(fit, state.partition)
    return data


def _check_reviewed_by_key(fit: FitContext, state: PartitionState, table: Table | None) -> None:
    """Refuse, of samples that are known by a key, decisions that could not be taken later."""
    if table is None:
        return
    check_reviewed(table, fit.task_format)
    if state.partition is not None:
        check_agrees(state.review, review_by_key(table, state.partition.keys, fit.task_format))


def _begin_validation(fit: FitContext, state: PartitionState, collector: EvidenceCollector) -> None:
    if collector.trajectory is not None:
        state.validation.begin(fit, state.fingerprint)
    elif state.validation.partition is None:
        rank_zero_warn(
            "judge_validation=True has no effect: the checkpoint's partition was computed without it. Train"
            " without ckpt_path, or resume from a checkpoint from before the partition."
        )


def _warn_where_no_round_follows(every: int | None, state: PartitionState, collector: EvidenceCollector) -> None:
    is_over = state.is_stable or collector.trajectory is not None
    if every is not None and state.partition is not None and not is_over:
        rank_zero_warn(
            f"every_n_epochs={every} has no effect: the checkpoint was saved without it and"
            " keeps no evidence. Train without ckpt_path to use it."
        )


def choose_points(
    fit: FitContext,
    trace: ForwardTrace,
    first: IndexedBatch,
    recipe: Recipe,
    layer: str | None,
) -> tuple[LayerPoint | None, LayerPoint | None]:
    """Return the layer at which the margin is attributed, and that for corrupted inputs (None for none).

    Args:
        fit: the fit that starts.
        trace: trace of its forward pass.
        first: the batch of that forward pass.
        recipe: declares whether inputs are judged, at which layer, and the attribution method.
        layer: path of the layer for the margin; None for the default.

    Raises:
        ValueError: for a layer that is not reached or has no row for each sample, and for settings that the task or
            the method does not support.
        MisconfigurationException: for networks that are trained in turns.
    """
    input_layer = recipe.input_layer
    if layer is None:
        check_classifies(fit, trace)
    point, batch = attributed_point(trace, layer, fit.task_format.num_outputs), len(first.index)
    # Whether an input is corrupted is not asked of the labels of a multi-label task, each by itself.
    is_multilabel = fit.task_format.task == "multilabel"
    # Nor of samples that are known by a key, over which there is no pass.
    asks_inputs = recipe.needs_input_statistics and not is_multilabel and fit.keyed is None
    early = early_points(trace, batch, input_layer) if asks_inputs else []
    attributed, *found = locate_samples(fit, first, [point, *early])
    responding = next((one for one in found if one is not None), None)
    for one, is_found in ((point, attributed), *((one, responding) for one in early if input_layer)):
        if is_found is None and not is_multilabel:
            raise ValueError(no_rows(one, batch))
    check_samples_first(attributed, recipe.attribution_method)
    if is_multilabel:
        check_several_labels(layer, recipe)
    return attributed, responding


def check_known_labels(fit: FitContext, first: IndexedBatch, known: Tensor | None) -> None:
    """Refuse data whose first batch does not match the labels in a checkpoint.

    Raises:
        ValueError: for another number of samples, or other labels.
    """
    if known is not None:
        task_format = fit.task_format
        check_same_size(len(known) // task_format.rows_per_sample, fit.total)
        there = (task_format.repeat_per_row(first.weight) > 0).cpu()
        check_same_labels(known[task_format.row_indices(first.index)[there]], first.label.cpu()[there])


def try_recipe(fit: FitContext, recipe: Recipe, basis: Tensor) -> None:
    """Run a user's recipe on synthetic evidence. Every rank must call it.

    Raises:
        ValueError: on every rank, if it fails on one.
    """
    index, _ = fit.shard(fit.total if fit.keyed is None else MIN_SAMPLES * fit.world_size)
    with isolate_rng():
        fault = trial(recipe, basis, index, fit.device)
    # Together, as the others would wait for a rank that has given up.
    if fit.agree(bool(fault), of_all=False):
        raise ValueError(fault or f"Recipe '{recipe.name}' failed on another rank; see its error.")


def take_review(fit: FitContext, state: PartitionState, table: Table | None, *, content: bool) -> None:
    """Take a person's decisions, which fit the data.

    Args:
        fit: that begins.
        state: takes them.
        table: what the file holds; None for no file.
        content: whether that of the data set's items counts.

    Raises:
        ValueError: for what does not fit, or differs from what a checkpoint's partition was computed with.
    """
    if table is None:
        return
    review = fit_to_data(fit, table, state.fingerprint, content=content)
    if not len(review):
        rank_zero_warn(
            f"No decisions in {review.path}: its column 'decision' is empty, so the recipe decides. Fill it"
            " with keep, drop or relabel, or leave out review."
        )
        if state.review is None:
            return
    if state.partition is not None:
        check_agrees(state.review, review)
    state.review = review if len(review) else None


def note_fit(
    fit: FitContext, state: PartitionState, settings: Mapping[str, Any], epochs_seen: int, *, may_be_recomputed: bool
) -> None:
    """Record the settings of this fit once, and log which parts of a checkpoint are kept under different settings.

    Args:
        fit: the fit that starts.
        state: receives the record.
        settings: settings of each callback of this package, by its name.
        epochs_seen: number of epochs with evidence in the checkpoint.
        may_be_recomputed: whether further partitions may follow.
    """
    size = None if fit.keyed is not None else getattr(fit.train_loader.batch_sampler, "batch_size", None)
    now = fit_record(fit.epoch, fit.world_size, size if isinstance(size, int) else None, settings)
    # Another callback may have asked first.
    if state.fits[-1:] == [now]:
        return
    if state.fits:
        said = what_holds(
            state.fits[-1],
            now,
            partition=state.partition,
            epochs_seen=epochs_seen,
            may_be_recomputed=may_be_recomputed,
        )
        if said:
            rank_zero_info(said)
    state.fits.append(now)


def remember_files(fit: FitContext, partition: Partition | None) -> None:
    """Add the files of the samples to a partition, if the training set lists them."""
    if partition is not None and fit.keyed is None:
        files = files_in(fit.train_loader.dataset)
        partition.remember_files(files if len(files) == len(partition) else ())
