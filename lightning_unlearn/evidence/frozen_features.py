"""Leave-one-out evidence from features that training has not changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_unlearn.attribution import BATCH_NORM, ForwardTrace, named_layers, record_activation, slice_batch
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.functional.leave_one_out import leave_one_out_logits, left_out_rate, objection_to, skill_of
from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.recipes.evidence import Evidence
from lightning_unlearn.trainer.context import FitContext, IndexedBatch
from lightning_unlearn.trainer.progress import rank_zero_info
from lightning_unlearn.utilities.reduce import Reduce, reduce_together

MOST_FEATURES = 4096
"""Largest number of features; wider layers are not used."""

MOST_NUMBERS = 2**26
"""Largest number of values stored per rank, a quarter of a gigabyte; beyond it, every second, third, ... sample is
used."""

# Number of samples used to check whether features have changed, and the relative difference allowed for rounding.
_ROWS = 4
_SAME = 1e-4

_FEWEST = 2  # classes


class FrozenFeatures:
    """Input of the first trained layer, if it does not change during the fit.

    This is the output of a frozen backbone, or the network's input if all layers are trained. Whether it has changed is
    measured, not inferred from ``requires_grad``: the features of a few samples are stored at the start of the fit and
    compared later. Batch norm statistics are restored for the comparison, since training changes them even in frozen
    layers, but without using labels.

    Attributes:
        point: the input of the layer; None if there are no such features.
    """

    def __init__(self) -> None:
        self.point: LayerPoint | None = None
        self._values: Tensor | None = None
        self._statistics: dict[str, Tensor] = {}
        self._x: Any = None
        self._parts: list[Tensor] = []
        self._seen = 0
        self._every = 1

    def start(self, fit: FitContext, trace: ForwardTrace, first: IndexedBatch) -> None:
        """Find and store the features when a fit starts or resumes. Every rank must call it.

        Args:
            fit: the running fit.
            trace: trace of a forward pass over the first batch.
            first: the first batch.
        """
        if self._x is not None:
            return
        samples = len(first.index)
        if self._values is None:
            # For a fit resumed without stored features, it is unknown what has changed before.
            self.point = None if fit.step else _first_trained(trace, fit, samples)
        if self.point is None:
            return
        try:
            rows = slice_batch(first.x, slice(0, _ROWS), samples)
        except ValueError:
            self.point = None
            return
        self._x = apply_to_collection(rows, Tensor, lambda value: value.detach().clone())
        if self._values is not None:
            self._check_resumed(fit)
            return
        before = set(trace.modules_before(self.point.name))
        found = _statistics(fit.model).items()
        self._statistics = {name: value.cpu().clone() for name, value in found if name.rpartition(".")[0] in before}
        self._values = self._look(fit)
        if not fit.agree(self._values is not None, of_all=True):
            self.point = None

    def _check_resumed(self, fit: FitContext) -> None:
        if not self._are_the_same(fit):
            rank_zero_info(
                f"Leave-one-out scores of the {self.point} are not used: after this checkpoint it cannot be"
                " verified that training left it unchanged, for example because of random augmentation."
            )
            self.point = None

    def _look(self, fit: FitContext) -> Tensor | None:
        """Return the features of the stored samples, with the stored batch norm statistics; None if that fails."""
        if self.point is None:
            return None
        with fit.isolated_eval(), torch.no_grad(), record_activation(fit.model, self.point) as take:
            for name, value in _statistics(fit.model).items():
                value.copy_(self._statistics.get(name, value))
            try:
                fit.output(self._x)
                return take().float().cpu()
            except Exception:  # for example a fixed batch size; these features are optional
                return None

    def _are_the_same(self, fit: FitContext) -> bool:
        found, known = self._look(fit), self._values
        same = found is not None and known is not None and found.shape == known.shape
        if same and found is not None and known is not None:
            same = bool((found - known).norm() <= _SAME * known.norm())
        return fit.agree(same, of_all=True)

    def hold(self, fit: FitContext, total: int) -> bool:
        """Return whether the features are unchanged, so that a pass may collect them. Every rank must call it.

        Args:
            fit: the running fit.
            total: N, number of samples over all ranks.
        """
        self._parts, self._seen = [], 0
        if self.point is None or self._x is None or self._values is None:
            return False
        if not self._are_the_same(fit):
            rank_zero_info(
                f"Leave-one-out scores of the {self.point} are not used: it has changed since the fit began, so it"
                " may have memorized labels."
            )
            return False
        share = -(-total // fit.world_size)
        self._every = max(1, -(-share * self._values.shape[1] // MOST_NUMBERS))
        return True

    def take(self, values: Tensor) -> None:
        """Store the features (B, D) of a batch of the pass."""
        self._parts.append(values[-self._seen % self._every :: self._every].float().cpu())
        self._seen += len(values)

    def added_to(self, evidence: Evidence, reduce: Reduce) -> Evidence:
        """Add leave-one-out scores to the evidence if they are usable, and discard the stored features.

        Args:
            evidence: evidence of all samples of the pass, including out-of-sample evidence.
            reduce: sums over the ranks.
        """
        out_of_sample = evidence.out_of_sample
        if out_of_sample is None or not self._parts:
            return evidence
        if evidence.soft_margins is not None:
            # With this many classes, one score per class would take too much memory.
            self._parts = []
            return evidence
        found = self._left_out(evidence, reduce)
        if found is None or not found[0].is_settled:
            return evidence
        rate, scores = found
        w = evidence.weight.double()
        right = (w @ (evidence.prediction == evidence.label).double()).reshape(1)
        given = w.new_zeros(evidence.num_classes).index_add(0, evidence.label, w)
        given, right = reduce_together(reduce, given, right)
        number, largest = given.sum().item(), (given.max() / given.sum()).item()
        fault = objection_to(
            rate,
            skill_of(right.item() / number, largest),
            None if out_of_sample.accuracy is None else skill_of(out_of_sample.accuracy, largest),
            out_of_sample.early.skill if out_of_sample.early is not None and out_of_sample.early.is_settled else None,
        )
        share = largest + rate.skill * (1 - largest)
        rank_zero_info(
            f"Training has not changed the {self.point}: ridge regression on it predicts {share:.1%} of the labels,"
            f" each left out in turn{f'; {fault}' if fault else ', which tells how many are wrong'}."
        )
        return (
            evidence
            if fault
            else replace(evidence, out_of_sample=replace(out_of_sample, left_out=rate), left_out=scores)
        )

    def _left_out(self, evidence: Evidence, reduce: Reduce) -> tuple[PrequentialRate, Tensor | None] | None:
        """Return the noise rate, and scores in the evidence's coordinates if the features of all samples are stored."""
        label, weight = (value[:: self._every] for value in (evidence.label, evidence.weight))
        features, self._parts = torch.cat(self._parts).to(label.device), []
        finite = features.isfinite().all(dim=1)
        features, weight = features.nan_to_num(0, 0, 0), weight.double() * finite
        counts = reduce(weight.new_zeros(evidence.num_classes).index_add(0, label, weight))
        present = (counts > 0).nonzero().flatten()
        if len(present) < _FEWEST:
            return None
        place = torch.zeros_like(counts, dtype=torch.int64)
        place[present] = torch.arange(len(present), device=place.device)
        logits = leave_one_out_logits(features, place[label], weight, len(present), reduce=reduce)
        rate = left_out_rate(logits, place[label], weight, reduce=reduce)
        bias = torch.zeros_like(counts)
        bias[present] = rate.bias
        scores = logits.to(evidence.basis) @ evidence.basis[present] if self._every == 1 else None
        return replace(rate, bias=bias.cpu()), scores

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state as tensors and primitives; None if no features are stored."""
        if self.point is None or self._values is None:
            return None
        return {
            "point": [self.point.name, self.point.at, self.point.samples],
            "values": self._values.clone(),
            "statistics": {name: value.clone() for name, value in self._statistics.items()},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any] | None) -> FrozenFeatures:
        """Create an instance from the state that :meth:`state_dict` returned."""
        features = cls()
        if state is not None:
            features.point = LayerPoint(*state["point"])
            features._values = state["values"]
            features._statistics = state["statistics"]
        return features


def _first_trained(trace: ForwardTrace, fit: FitContext, samples: int) -> LayerPoint | None:
    """Return the input of the first layer that an optimizer trains, if it has shape (B, D); else None."""
    groups = [group for optimizer in fit.optimizers for group in optimizer.param_groups]
    trained = {parameter for group in groups for parameter in group["params"] if parameter.requires_grad}
    call = next((one for one in trace.calls if not trained.isdisjoint(one.module.parameters(recurse=False))), None)
    if call is None or not call.inputs or len(trace.calls_of(call.name)) != 1:
        return None
    x = call.inputs[0]
    is_row = isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2 and len(x) == samples
    return LayerPoint(call.name, "input") if is_row and x.shape[1] <= MOST_FEATURES else None


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of all batch norms, by name."""
    norms = [(name, one) for name, one in named_layers(model).items() if isinstance(one, BATCH_NORM)]
    found = {f"{name}.{of}": getattr(module, of) for name, module in norms for of in ("running_mean", "running_var")}
    return {name: value for name, value in found.items() if value is not None}
