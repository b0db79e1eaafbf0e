"""What the Trainer's loggers are told of a partition and of masks: numbers, and pictures where they can show any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_unlearn.results.labels import REASONS
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.partition import Partition
from lightning_unlearn.results.plots import new_axes, pixels, plot_mask, plot_partition
from lightning_unlearn.trainer.compat import is_lightning_instance
from lightning_unlearn.trainer.fit_loop import log_values

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit

Show = Callable[[Any, str, Any, int], None]


def log_partition(fit: RunningFit, partition: Partition) -> None:
    """Log what was found, and a picture.

    The noise rate where it is known, the share of samples that is kept, the two lists, and why samples are suspect.
    """
    counts = partition.reason[~partition.is_clean].long().bincount(minlength=len(REASONS)).tolist()
    by_reason = {f"unlearn/suspects_{word}": float(counts[code]) for code, word in enumerate(REASONS) if code}
    expected = partition.expected_precision
    log_values(
        fit.pl_module,
        {
            **({} if partition.noise_rate is None else {"unlearn/noise_rate": partition.noise_rate}),
            "unlearn/kept_share": partition.is_clean.float().mean().item(),
            "unlearn/suspects": float(len(partition.suspect_indices())),
            "unlearn/worth_review": float(partition.worth_review()),
            **({} if expected is None else {"unlearn/expected_precision": expected}),
            **by_reason,
        },
    )
    log_figure(fit, "unlearn/partition", lambda: plot_partition(partition, new_axes(2))[0])


def log_masks(fit: RunningFit, masks: Sequence[NeuronMask]) -> None:
    """Log a picture of each layer's neurons."""
    for mask in masks:

        def draw(mask: NeuronMask = mask) -> Any:
            return plot_mask(mask, new_axes(1)[0])[0]

        log_figure(fit, f"unlearn/neurons_{mask.layer}", draw)


def log_figure(fit: RunningFit, name: str, draw: Callable[[], Any]) -> None:
    """Hand a picture to those loggers that show pictures, on rank 0; a logger that fails costs the fit nothing.

    Args:
        fit: that is running.
        name: of the picture.
        draw: makes the matplotlib figure; called only where somebody is to see it and matplotlib is installed.
    """
    pl_module, gave_up = fit.pl_module, fit.memory.gave_up
    takers = [
        (logger, show)
        for logger in pl_module.loggers
        for kind, show in _SHOW.items()
        if is_lightning_instance(logger, kind) and id(logger) not in gave_up
    ]
    if not takers or not fit.trainer.is_global_zero or find_spec("matplotlib") is None:
        return
    for logger, show in takers:
        if said := _failure(show, logger, name, draw, pl_module.global_step):
            gave_up.add(id(logger))
            rank_zero_warn(
                f"{type(logger).__name__} failed to log figure '{name}' ({said}). Figures are disabled for this logger."
            )


def _failure(show: Show, logger: Any, name: str, draw: Callable[[], Any], step: int) -> str:
    """Return what went wrong, in words; anything may on the way to a server, and a fit must not end for a picture."""
    try:
        show(logger, name, draw(), step)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _show_tensorboard(logger: Any, name: str, figure: Any, step: int) -> None:
    logger.experiment.add_figure(name, figure, global_step=step)


def _show_mlflow(logger: Any, name: str, figure: Any, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"{name}_step_{step}.png")


def _show_wandb(logger: Any, name: str, figure: Any, step: int) -> None:
    logger.log_image(key=name, images=[pixels(figure)], step=step)


# By the class of Lightning's own logger; other loggers, as that of CSV files, show no pictures.
_SHOW: dict[str, Show] = {
    "TensorBoardLogger": _show_tensorboard,
    "MLFlowLogger": _show_mlflow,
    "WandbLogger": _show_wandb,
}
