"""Which field of a batch the loss follows: seen in the gradient that the first training steps send to the logits.

Whatever the loss is, it raises the logit of the class that it is given: of cross-entropy with weights or smoothing,
focal or squared error it is the one with the most negative gradient, of binary cross-entropy the sign tells. So the
field of the batch whose classes these are is what the loss goes by. Where samples are mixed it is one of two fields'
for every row, so a field that a good share of the rows agrees with is not ruled out.
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

# So many steps are looked at, at most, until it is clear what the loss follows.
MOST_STEPS = 16
# A field is followed rather than another if so many more rows agree with it alone, and so many times as many.
_FEWEST = 4
_TIMES = 3
# A field is followed if more rows agree with it than by chance, by so many standard deviations; if of so many rows no
# more do, it is not.
_SURELY = 4.0
_ENOUGH = 64
# Rows of classes that come again, and the share of them whose gradient says the same other class again, from which on
# the loss counts as following the labels under other numbers.
_AGAIN = 12
_ALWAYS = 0.95

# Fields that are looked at, at most; the same number on every rank, whatever it was given.
_MOST_FIELDS = 16

_LABEL: Path = ()  # what batch_to_xy has made, which is no field


def agreement(value: Any, gradient: Tensor, task_format: TaskFormat) -> Tensor:
    """Return (B,) bool, rows whose logit the loss raises where a field says so.

    Args:
        value: the field: class indices, or a row with a number for each output.
        gradient: (B, K), of the loss at the output.
        task_format: knows the task.
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
    """Looks at the first training steps of a fit, until it is clear which field the loss follows.

    The head's output is looked at, and the gradient that reaches it; nothing of the fit is changed. ``is_watching``
    tells whether it goes on.

    Args:
        task_format: what was taken for the labels.
    """

    def __init__(self, task_format: TaskFormat) -> None:
        self._reading = task_format
        self._head_watch = HeadWatch()
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks at nothing.
        return vars(LabelWatch(self._reading))

    def detach(self) -> None:
        """Stop looking. May be called at any time, and again."""
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
        """Start at the next step.

        Args:
            model: the user's.
            head: dotted path of the module that makes the logits; None if there is none.
        """
        self.detach()
        self._head = head
        if head is not None:
            self._module = resolve_layer(model, head)
        self.is_watching = head is not None or self._reading.is_open

    def start_batch(self, batch: Any) -> None:
        """Note what the step is given. Call in ``on_train_batch_start``.

        Raises:
            TypeError: where more than one field may hold the labels, and there is no head to tell.
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
        except Exception:  # the reader of training steps says so
            return
        own = self._reading.layout.label if self._reading.layout is not None else _LABEL
        fields = {path: value.clone() for path, value in leaves_of(batch) if has_rows(value, rows)}
        fields[own] = label.clone() if isinstance(label, Tensor) else torch.as_tensor(label)
        self._fields = self._fields or sorted(fields, key=lambda path: path != own)[:_MOST_FIELDS]
        self._values = [fields.get(path) for path in self._fields]
        self._head_watch.start(self._module, Step(range(rows), label, self._reading.num_outputs))

    def end_batch(self, reduce: Reduce, *, trained: bool = True) -> Path | None:
        """Return what the step has shown. Call after its backward pass and before the weights change; every rank must.

        Args:
            reduce: sums over the ranks.
            trained: whether there was a backward pass.

        Returns:
            another field that the loss follows; None as long as there is none.

        Raises:
            TypeError: where the loss follows no field, or which of several is not clear.
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
            judged &= own >= 0  # of a label that is ignored, a mask of the user's may make anything
        agree = gradient.new_zeros(_MOST_FIELDS, len(gradient), dtype=torch.float64)
        for at, value in enumerate(self._values):
            agree[at] = (self._agrees(value, gradient) & judged).double()
        alone = agree @ (1 - agree).T
        # On the diagonal, how many agree at all.
        both = alone - torch.diag(alone.diagonal()) + torch.diag(agree.sum(dim=1))
        return _numbers(both, float(judged.sum()), 0.0, float(self._is_renamed(own, gradient, judged)))

    def _agrees(self, value: Tensor | None, gradient: Tensor) -> Tensor:
        try:
            if value is not None and not value.is_complex():
                found = agreement(value.to(gradient.device), gradient, self._reading)
                # Of a single sample, features may look like labels of several.
                if found.shape == (len(gradient),):
                    return found
        except (ValueError, RuntimeError):  # of a form that no label has
            pass
        return torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)

    def _is_renamed(self, value: Tensor | None, gradient: Tensor, judged: Tensor) -> bool:
        """Return whether the loss raises other classes than the labels, but always the same one for a label."""
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
    """Return what a step has shown, as one vector, to be summed over steps and ranks.

    Args:
        agree: (F, F), rows that agree with field i and not with j; on the diagonal those that agree with i.
        rows: that can be judged.
        blind: 1 where nothing can be read of the step.
        renamed: 1 where the gradient says another class, the same one for every label.
    """
    return torch.cat([agree.flatten().double().cpu(), torch.tensor([rows, blind, renamed], dtype=torch.float64)])


@dataclass(frozen=True, eq=False)
class _Sums:
    """What some steps have shown on all ranks; field 0 is what was taken for the labels."""

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
        """Count the rows that agree with what was taken for the labels."""
        return float(self.agree[0, 0]) / max(self.rows, 1)

    def is_followed(self, classes: int) -> bool:
        """Return whether more rows than by chance agree with what was taken for the labels."""
        expected = self.rows / classes
        deviation = (expected * (1 - 1 / classes)) ** 0.5
        return self.rows > 0 and float(self.agree[0, 0]) - expected >= _SURELY * deviation

    def _is_ahead(self, one: int, other: int) -> bool:
        alone, against = float(self.agree[one, other]), float(self.agree[other, one])
        return alone >= _FEWEST and alone >= _TIMES * against

    def other(self) -> int | None:
        """Return the field that is clearly followed instead of the one taken, and rather than any other."""
        better = [at for at in range(1, _MOST_FIELDS) if self._is_ahead(at, 0)]
        best = [at for at in better if not any(self._is_ahead(rival, at) for rival in better)]
        # One that most rows agree with: two that are each right now and then are both none.
        return next((at for at in best if self.agree[at, at] > self.rows / 2), None)

    def is_ahead_of_all(self) -> bool:
        """Return whether every other field says the same, or is clearly followed less."""
        return all(
            self._is_ahead(0, at) or float(self.agree[0, at]) == float(self.agree[at, 0]) == 0
            for at in range(1, _MOST_FIELDS)
        )
