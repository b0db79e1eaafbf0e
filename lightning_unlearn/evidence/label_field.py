"""Detect the batch field that the loss uses as labels, from the gradient at the logits in the first training steps.

Any classification loss raises the logit of the given class. For cross-entropy with weights or smoothing, focal loss and
squared error this is the logit with the most negative gradient; for binary cross-entropy the sign of the gradient gives
the class. The field with the same classes is the one the loss uses. If samples are mixed, the class of each row comes
from one of two fields, so a field that agrees with many rows is not ruled out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution import resolve_layer
from lightning_unlearn.attribution.head_watch import HeadWatch, Step
from lightning_unlearn.data.batch import Path, has_rows, how_to_split, leaves_of, shown_path
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.utilities.reduce import Reduce

# Largest number of steps to inspect.
MOST_STEPS = 16
# A field is preferred to another if at least this many rows agree with it alone, and this many times as many as with
# the other alone.
_FEWEST = 4
_TIMES = 3
# The loss follows a field if more rows than by chance agree with it, by this many standard deviations. If it does not
# after this many rows, it follows another one.
_SURELY = 4.0
_ENOUGH = 64
# Least number of repeated labels, and the share of them with the same raised class, from which on the loss counts as
# using renumbered labels.
_AGAIN = 12
_ALWAYS = 0.95

# Largest number of fields to compare. Sums over ranks need the same size on every rank.
_MOST_FIELDS = 16

_LABEL: Path = ()  # labels returned by batch_to_xy, which are not a field


def agreement(value: Any, gradient: Tensor, task_format: TaskFormat) -> Tensor:
    """Return (B,) bool, whether the loss raises the logit of the class in a field.

    Args:
        value: the field: class indices (B,), or a number for each output (B, K).
        gradient: (B, K), gradient of the loss at the output.
        task_format: determines the task.
    """
    columns = gradient.shape[1]
    if columns == 1:
        return torch.eq(gradient.flatten() < 0, value.reshape(len(gradient)) > 0.5)
    if value.ndim == 2 and value.shape[1] == columns:
        if task_format.alike(gradient, value).task == "multilabel":
            known = value != (task_format.data.ignore_index if task_format.data.ignore_index is not None else torch.inf)
            known &= ~value.isnan() if value.is_floating_point() else known
            agrees: Tensor = (torch.eq(gradient < 0, value > 0.5) | ~known).all(dim=1)
            return agrees
        value = value.argmax(dim=1)
    return torch.eq(gradient.argmin(dim=1), value.reshape(len(gradient)))


class LabelWatch:
    """Inspect the first training steps of a fit until it is clear which field the loss follows.

    It reads the head's output and the gradient at it, and changes nothing in the fit.

    Args:
        task_format: contains the field currently assumed to hold the labels.

    Attributes:
        is_watching: whether steps are still inspected.
    """

    def __init__(self, task_format: TaskFormat) -> None:
        self._reading = task_format
        self._head_watch = HeadWatch()
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not watch the fit.
        return vars(LabelWatch(self._reading))

    def detach(self) -> None:
        """Stop watching. May be called at any time and repeatedly."""
        self._head_watch.end()
        self._head: str | None = None
        self._module: nn.Module | None = None
        self.is_watching = False
        self._fields: list[Path] = []
        self._pending = False
        self._batch: Any = None
        self._values: list[Tensor | None] = []
        self._sums: Tensor | None = None
        self._steps = 0

    def start(self, model: nn.Module, head: str | None) -> None:
        """Start watching at the next step.

        Args:
            model: the user's model.
            head: dotted path of the module that returns the logits; None if there is none.
        """
        self.detach()
        self._head = head
        if head is not None:
            self._module = resolve_layer(model, head)
        self.is_watching = head is not None or self._reading.is_open

    def start_batch(self, batch: Any) -> None:
        """Record the batch of a step. Call in ``on_train_batch_start``.

        Raises:
            TypeError: if more than one field may hold the labels and there is no head.
        """
        if not self.is_watching:
            return
        self._head_watch.end()
        if self._module is None:
            raise TypeError(self._cannot_tell(batch, "no module of the model returns the logits that forward returns"))
        self._pending, self._batch, self._values = True, batch, []
        try:
            label = self._reading.split(batch)[1]
            rows = len(label)
        except Exception:  # reported by TrainStepReader
            return
        own = self._reading.layout.label if self._reading.layout is not None else _LABEL
        fields = {path: value.clone() for path, value in leaves_of(batch) if has_rows(value, rows)}
        fields[own] = label.clone() if isinstance(label, Tensor) else torch.as_tensor(label)
        self._fields = self._fields or sorted(fields, key=lambda path: path != own)[:_MOST_FIELDS]
        self._values = [fields.get(path) for path in self._fields]
        self._head_watch.start(self._module, Step(range(rows), label, self._reading.num_outputs))

    def end_batch(self, reduce: Reduce, *, trained: bool = True) -> Path | None:
        """Evaluate the step. Every rank must call it after the backward pass, before the weights change.

        Args:
            reduce: sums over the ranks.
            trained: whether there was a backward pass.

        Returns:
            the path of another field, if the loss clearly follows that one; else None.

        Raises:
            TypeError: if the loss follows no field, or if it is unclear which one it follows.
        """
        if not self.is_watching or not self._pending:
            return None
        step = self._head_watch.end()
        batch, self._batch, self._pending = self._batch, None, False
        numbers = reduce(self._of_step(step, 1.0 if trained else 0.0))
        self._steps += 1
        self._sums = numbers if self._sums is None else self._sums + numbers
        found = _Sums(self._sums)
        if (other := found.other()) is not None and other < len(self._fields):
            path = self._fields[other]
            if self._reading.data.batch_to_xy is not None:
                raise TypeError(self._not_followed(found, batch, f" and follows {shown_path(path, batch)}", path))
            self.detach()
            return path
        self._judge(found, batch)
        return None

    def _judge(self, found: _Sums, batch: Any) -> None:
        classes = max(self._reading.num_outputs, 2)
        if found.blind and self._reading.is_open:
            raise TypeError(self._cannot_tell(batch, f"no gradient at the output of '{self._head}' can be read"))
        if found.renamed and not found.is_followed(classes):
            raise TypeError(
                self._not_followed(found, batch, ", for example because training_step renumbers the classes")
            )
        if found.is_followed(classes) and found.is_ahead_of_all():
            self.detach()
        elif self._steps >= MOST_STEPS:
            if found.rows >= _ENOUGH and not found.is_followed(classes):
                raise TypeError(self._not_followed(found, batch, ", which is chance level"))
            if self._reading.is_open:
                raise TypeError(self._cannot_tell(batch, f"the first {MOST_STEPS} steps do not show it"))
            self.detach()

    def _of_step(self, step: Step | None, blind: float) -> Tensor:
        gradient = None if step is None else step.gradient_rows()
        if gradient is None:
            return _numbers(torch.zeros(_MOST_FIELDS, _MOST_FIELDS), 0.0, blind, 0.0)
        largest = gradient.abs().amax(dim=1)
        judged = largest.isfinite() & (largest > 0)
        own = self._values[0]
        if own is not None and own.ndim == 1 and not own.is_floating_point():
            judged &= own >= 0  # the gradient of an ignored label depends on the user's mask
        agree = gradient.new_zeros(_MOST_FIELDS, len(gradient), dtype=torch.float64)
        for at, value in enumerate(self._values):
            agree[at] = (self._agrees(value, gradient) & judged).double()
        alone = agree @ (1 - agree).T
        # The diagonal counts all rows that agree with a field.
        both = alone - torch.diag(alone.diagonal()) + torch.diag(agree.sum(dim=1))
        return _numbers(both, float(judged.sum()), 0.0, float(self._is_renamed(own, gradient, judged)))

    def _agrees(self, value: Tensor | None, gradient: Tensor) -> Tensor:
        try:
            if value is not None and not value.is_complex():
                found = agreement(value.to(gradient.device), gradient, self._reading)
                # With a single sample, features may look like the labels of several samples.
                if found.shape == (len(gradient),):
                    return found
        except (ValueError, RuntimeError):  # the shape or type is not that of labels
            pass
        return torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)

    def _is_renamed(self, value: Tensor | None, gradient: Tensor, judged: Tensor) -> bool:
        """Return whether the loss raises a class other than the label, and always the same one for each label."""
        if value is None or value.is_floating_point() or value.numel() != len(gradient):
            return False
        raised_class = (gradient < 0).long().flatten() if gradient.shape[1] == 1 else gradient.argmin(dim=1)
        given, raised_class = value.flatten()[judged].cpu(), raised_class[judged].cpu()
        again, same, others = 0, 0, True
        for label in torch.unique(given).tolist():
            raised = raised_class[given == label]
            most = int(raised.mode().values)
            again += len(raised) - 1
            same += int((raised == most).sum()) - 1
            others &= most != label
        return others and again >= _AGAIN and same >= _ALWAYS * again

    def _not_followed(self, found: _Sums, batch: Any, why: str, label: Path | None = None) -> str:
        line = how_to_split(batch, label if label is not None else self._own, y="..." if label is None else None)
        return (
            f"Expected the loss to follow the labels, {self._shown(batch)}, but it raises the logit of that"
            f" class in {found.share():.0%} of {found.rows:.0f} rows{why}; {line}, with y the labels that the"
            " loss uses."
        )

    def _cannot_tell(self, batch: Any, why: str) -> str:
        task_format = self._reading
        others = [shown_path(path, batch) for path in task_format.rivals]
        line = how_to_split(batch, task_format.rivals[0]) if task_format.rivals else how_to_split(batch)
        return (
            f"Cannot determine which field of a batch holds the labels, {self._shown(batch)} or"
            f" {', '.join(others)}: {why}; {line}, with y the labels that the loss uses."
        )

    @property
    def _own(self) -> Path | None:
        return None if self._reading.layout is None else self._reading.layout.label

    def _shown(self, batch: Any) -> str:
        return "what batch_to_xy returns" if self._own is None else shown_path(self._own, batch)


def _numbers(agree: Tensor, rows: float, blind: float, renamed: float) -> Tensor:
    """Pack the counts of a step into one vector, to be summed over steps and ranks.

    Args:
        agree: (F, F), number of rows that agree with field i but not j; on the diagonal, all that agree with i.
        rows: number of rows with a usable gradient.
        blind: 1 if no gradient of the step can be read.
        renamed: 1 if the loss raises another class, the same one for every label.
    """
    return torch.cat([agree.flatten().double().cpu(), torch.tensor([rows, blind, renamed], dtype=torch.float64)])


@dataclass(frozen=True, eq=False)
class _Sums:
    """Counts summed over steps and ranks; field 0 is the one assumed to hold the labels."""

    numbers: Tensor

    @property
    def agree(self) -> Tensor:
        return self.numbers[:-3].reshape(_MOST_FIELDS, _MOST_FIELDS)

    @property
    def rows(self) -> float:
        return float(self.numbers[-3])

    @property
    def blind(self) -> bool:
        return bool(self.numbers[-2] > 0)

    @property
    def renamed(self) -> bool:
        return bool(self.numbers[-1] > 0)

    def share(self) -> float:
        """Return the fraction of rows that agree with the assumed labels."""
        return float(self.agree[0, 0]) / max(self.rows, 1)

    def is_followed(self, classes: int) -> bool:
        """Return whether significantly more rows than by chance agree with the assumed labels."""
        expected = self.rows / classes
        deviation = (expected * (1 - 1 / classes)) ** 0.5
        return self.rows > 0 and float(self.agree[0, 0]) - expected >= _SURELY * deviation

    def _is_ahead(self, one: int, other: int) -> bool:
        alone, against = float(self.agree[one, other]), float(self.agree[other, one])
        return alone >= _FEWEST and alone >= _TIMES * against

    def other(self) -> int | None:
        """Return the number of a field that the loss clearly follows instead of the assumed one; None without one."""
        better = [at for at in range(1, _MOST_FIELDS) if self._is_ahead(at, 0)]
        best = [at for at in better if not any(self._is_ahead(rival, at) for rival in better)]
        # Most rows must agree with it: of two fields that are each right sometimes, neither is the label.
        return next((at for at in best if self.agree[at, at] > self.rows / 2), None)

    def is_ahead_of_all(self) -> bool:
        """Return whether every other field is equal to the assumed labels, or clearly agrees with fewer rows."""
        return all(
            self._is_ahead(0, at) or float(self.agree[0, at]) == float(self.agree[at, 0]) == 0
            for at in range(1, _MOST_FIELDS)
        )
