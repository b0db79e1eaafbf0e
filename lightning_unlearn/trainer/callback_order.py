"""Order of our callbacks among the Trainer's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from lightning_unlearn.trainer.compat import is_lightning_instance
from lightning_unlearn.trainer.fit_loop import averages_weights

if TYPE_CHECKING:
    from lightning_unlearn.trainer.running_fit import RunningFit


def callbacks_of(trainer: Trainer) -> list[Any]:
    """Return the Trainer's callbacks, an attribute without a type declaration."""
    return list(getattr(trainer, "callbacks", []))


def _put_callbacks(fit: RunningFit, callbacks: list[Any]) -> None:
    if fit.memory.callbacks is None:
        fit.memory.callbacks = callbacks_of(fit.trainer)
    setattr(fit.trainer, "callbacks", callbacks)  # noqa: B010  (see callbacks_of)


def move_before_progress_bars(fit: RunningFit, callback: Any) -> None:
    """Move a callback before the progress bars, which read the number of batches at the start of an epoch.

    The list is replaced and not modified, since Lightning's hook loop is iterating over the old one.
    """
    callbacks = callbacks_of(fit.trainer)
    here = callbacks.index(callback)
    bar = next((i for i, other in enumerate(callbacks[:here]) if is_lightning_instance(other, "ProgressBar")), None)
    if bar is None:
        return
    callbacks.insert(bar, callbacks.pop(here))
    _put_callbacks(fit, callbacks)


def move_behind_averages(fit: RunningFit, callback: Any) -> None:
    """Move a callback behind those that average weights, which replace the model's weights at the end."""
    callbacks = callbacks_of(fit.trainer)
    last = max((i for i, other in enumerate(callbacks) if averages_weights(other)), default=-1)
    here = callbacks.index(callback)
    if here < last:
        callbacks.insert(last, callbacks.pop(here))
        _put_callbacks(fit, callbacks)


def restore_order(fit: RunningFit) -> None:
    """Restore the user's callback order, unless callbacks were added or removed."""
    given, now = fit.memory.callbacks, callbacks_of(fit.trainer)
    fit.memory.callbacks = None
    if given is not None and sorted(map(id, given)) == sorted(map(id, now)):
        setattr(fit.trainer, "callbacks", given)  # noqa: B010  (see callbacks_of)
