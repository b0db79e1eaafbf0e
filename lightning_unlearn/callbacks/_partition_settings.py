"""Whether the settings of a partition can work: by themselves, with the Trainer's, with the model and its task."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_unlearn.callbacks._lightning import is_fast_dev_run
from lightning_unlearn.callbacks._packages import MisconfigurationException
from lightning_unlearn.capture import GRADIENT_X_ACTIVATION, ForwardTrace, check_reached, plain_name
from lightning_unlearn.recipes import Recipe
from lightning_unlearn.types import LayerPoint


def check_epochs(at_epoch: int, evidence_every_n_epochs: int, every_n_epochs: int | None) -> None:
    """Refuses numbers of epochs below 1.

    Raises:
        ValueError: naming the argument.
    """
    if at_epoch < 1:
        raise ValueError(
            f"Expected at_epoch to be at least 1, the number of epochs trained on all the data, but got {at_epoch}."
        )
    if evidence_every_n_epochs < 1:
        raise ValueError(
            f"Expected evidence_every_n_epochs to be at least 1, but got {evidence_every_n_epochs}; for a single"
            " pass set it to at_epoch."
        )
    if every_n_epochs is not None and every_n_epochs < 1:
        raise ValueError(
            f"Expected every_n_epochs to be at least 1, or None for one partition, but got {every_n_epochs}."
        )


def check_one_of(name: str, value: str, allowed: tuple[str, str]) -> None:
    """Refuses any other value of an argument.

    Raises:
        ValueError: naming both.
    """
    if value not in allowed:
        raise ValueError(f"Expected {name} to be {allowed[0]!r} or {allowed[1]!r}, but got {value!r}.")


def check_shares(*, threshold: float, min_class_share: float, stable_share: float) -> None:
    """Refuses shares and probabilities outside of their range.

    Raises:
        ValueError: naming the argument.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"Expected threshold to lie in (0, 1), but got {threshold}.")
    for name, share in (("min_class_share", min_class_share), ("stable_share", stable_share)):
        if not 0 <= share < 1:
            raise ValueError(f"Expected {name} to lie in [0, 1), but got {share}.")


def check_max_epochs(trainer: Trainer, at_epoch: int, *, may_be_last: bool) -> None:
    """Refuses a partition after which no epoch is left.

    Args:
        trainer: of the fit.
        at_epoch: after how many epochs it is drawn.
        may_be_last: whether nothing is to follow it, so that training may end with it.

    Raises:
        MisconfigurationException: with both numbers.
    """
    max_epochs = trainer.max_epochs
    if max_epochs == at_epoch and may_be_last:
        return
    if max_epochs is not None and 0 <= max_epochs <= at_epoch and not is_fast_dev_run(trainer):
        raise MisconfigurationException(
            "Expected at_epoch to be less than the Trainer's max_epochs, so that epochs are left after the"
            f" partition, but got at_epoch={at_epoch} and max_epochs={max_epochs}."
        )


def check_several_labels(layer: str | None, method: str, recipe: Recipe) -> None:
    """Refuses what a multi-label task, each label of which is judged by itself, cannot have.

    Raises:
        ValueError: naming the argument to leave out.
    """
    found = {
        "layer": (layer, layer is not None),
        "method": (method, method != GRADIENT_X_ACTIVATION),
        "recipe": (recipe.name, recipe.needs_rows),
    }
    for name, (value, is_wrong) in found.items():
        if is_wrong:
            raise ValueError(
                "Expected a multi-label task to be attributed at the input of its head by"
                f" {GRADIENT_X_ACTIVATION}, but got {name}={value!r}; leave {name} out."
            )


def attributed_point(trace: ForwardTrace, layer: str | None, num_outputs: int) -> LayerPoint:
    """Where the margin is attributed: at the output of the layer that was named, or at the input of the head.

    Raises:
        ValueError: where ``forward`` does not call that layer once.
    """
    point = LayerPoint(trace.head(num_outputs), "input") if layer is None else LayerPoint(plain_name(layer), "output")
    check_reached(trace, point)
    return point


def early_point(trace: ForwardTrace, batch: int, input_layer: str | None) -> LayerPoint | None:
    """Where corrupted inputs show: at the output of the layer that was named, or where the first block has seen them.

    Raises:
        ValueError: where ``forward`` does not call the layer that was named once.
    """
    if input_layer is None:
        return trace.first_block(batch)
    point = LayerPoint(plain_name(input_layer), "output")
    check_reached(trace, point)
    return point
