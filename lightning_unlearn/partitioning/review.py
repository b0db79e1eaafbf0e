"""A person's decisions in a fit: read once for all ranks, compared with the data before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from torch import Tensor

from lightning_unlearn.partitioning.build import refusal_reason
from lightning_unlearn.partitioning.label_scores import ShardResult
from lightning_unlearn.results.review import AppliedReview, Review, validate_review
from lightning_unlearn.results.review_csv import Table, read_review
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.data_checks import class_labels, read_labels
from lightning_unlearn.trainer.progress import rank_zero_warn


def open_review(fit: FitContext, path: str | PathLike[str] | None) -> Table | None:
    """Return the decisions in a file, read by rank 0 and broadcast; errors are raised on every rank.

    Raises:
        ValueError: with the line, for what is wrong in it.
        FileNotFoundError: if the file does not exist on rank 0.
    """
    return None if path is None else fit.on_rank_zero(lambda: read_review(path))


def fit_to_data(fit: FitContext, table: Table, fingerprint: str, *, content: bool) -> Review:
    """Return the decisions, which fit the training set as far as its size, fingerprint and 16 labels tell.

    Args:
        fit: the fit that starts.
        table: contents of the file.
        fingerprint: fingerprint of the training set.
        content: whether to compare the content of its items.

    Raises:
        ValueError: with the line, for what does not fit; on every rank.
    """
    task_format, loader = fit.task_format, fit.scoring_loader
    several = task_format.task == "multilabel"
    with fit.isolated_eval():
        review = validate_review(
            table,
            total=len(loader.dataset),  # type: ignore[arg-type]  # its length has been checked
            classes=task_format.num_outputs if several else task_format.num_classes,
            labels=task_format.num_outputs if several else None,
            fingerprint=fingerprint,
            content=content,
        )
        compared = review.compared()
        if len(compared):
            label = class_labels(task_format, read_labels(fit, loader, review.index[compared]))
            review.check_labels(compared, label.reshape(review.given_label[compared].shape))
    return review


def check_agrees(before: Review | None, now: Review) -> None:
    """Refuse decisions that differ from those of the checkpoint's partition.

    Raises:
        ValueError: if they differ.
    """
    if before is None or not before.equals(now):
        made = "without decisions" if before is None else f"with other decisions ({before.path})"
        raise ValueError(
            f"The decisions in {now.path} must be given before the partition is computed, but the partition of"
            f" the checkpoint was computed {made}. Resume from a checkpoint from before the partition, train"
            " without ckpt_path, or leave review out to continue with the decisions in the checkpoint."
        )


def decided_of(review: Review | None, judged: Sequence[ShardResult], label: Tensor) -> AppliedReview | None:
    """Return a person's decisions by sample; None if there are none.

    Args:
        review: the decisions.
        judged: results of the recipe for this rank's shard.
        label: (N,) or (N, L), the given labels.
    """
    if review is None:
        return None
    decided = review.apply_to(label)
    if decided.stale:
        rank_zero_warn(
            f"{decided.stale:,} decisions in {review.path} are ignored: the labels of these samples have changed"
            " since the file was written."
        )
    if objection := refusal_reason(judged):
        rank_zero_warn(
            f"The recipe was inconclusive ({objection}). Samples without a decision in {review.path} are treated as"
            " clean."
        )
    return decided
