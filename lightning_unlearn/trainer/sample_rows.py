"""Which row of an activation is of which sample of a batch: seen in passes over fewer samples and in another order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.attribution import record_activation, sample_dimension, slice_batch
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.data.loaders import iterate_indices
from lightning_unlearn.trainer.context import FitContext, IndexedBatch


@dataclass(frozen=True, eq=False)
class _Passes:
    """What some layers, and ``forward``, last, have for a batch, for fewer samples, in reverse and once more.

    Args:
        samples: B.
        fewer: how many of them the second pass is of.
        seen: of each pass the activations and the output; None for one that fails.
    """

    samples: int
    fewer: int
    seen: Sequence[list[Tensor] | None]

    def dimension(self, at: int) -> int | None:
        """Return the dimension of one of them that counts samples."""
        whole, part, reverse, again = (None if one is None else one[at] for one in self.seen)
        return None if whole is None else sample_dimension(whole, part, reverse, self.samples, self.fewer, again)


def locate_samples(fit: FitContext, first: IndexedBatch, points: Sequence[LayerPoint]) -> list[LayerPoint | None]:
    """Return the points, with the dimension that counts samples; None for one that has no row for each sample.

    Time-first layers have it second; where there are as many steps as samples, sizes do not tell. Every rank must call
    it, before the first step.

    Args:
        fit: that begins.
        first: the first batch.
        points: each of a layer that is called once.

    Raises:
        ValueError: where ``forward`` does not return the logits of the batch's samples, in their order.
    """
    samples = len(first.index)
    fewer = samples - 1 if samples > 1 else 2
    with fit.isolated_eval(), torch.no_grad():

        def run(x: Any) -> list[Tensor]:
            with ExitStack() as stack:
                takes = [
                    stack.enter_context(record_activation(fit.model, replace(point, samples=0))) for point in points
                ]
                output = fit.output(x)
                return [*(take() for take in takes), output]

        def loaded(index: Tensor) -> Any:
            _, batch = next(iterate_indices(fit.scoring_loader, first.index[index], probing=True, absent=set()))
            return fit.task_format.split(fit.to_device(batch))[0]

        def taken(index: Tensor) -> Any:
            return slice_batch(first.x, index, samples)

        whole = run(first.x)
        less = torch.arange(samples)[:fewer] if samples > 1 else torch.zeros(2, dtype=torch.int64)
        orders = (less, torch.arange(samples).flip(0), torch.arange(samples))
        # Of the batch in hand, if it can be taken apart by rows; else, or where its rows are no samples, as the loader
        # delivers these samples.
        passes = _Passes(samples, fewer, (whole, *(_tried(run, taken, order) for order in orders)))
        if passes.dimension(len(points)) != 0 and fit.keyed is None:
            passes = _Passes(samples, fewer, (whole, *(_tried(run, loaded, order) for order in orders)))
        if passes.dimension(len(points)) != 0:
            raise ValueError(
                f"Expected forward of {type(fit.model).__name__} to return the logits of each sample of a batch, in the"
                f" order of the batch, but of {samples} samples it returned {len(whole[-1])} rows that do not follow"
                " them where these are fewer or in another order; return one row of logits for each sample, or pass"
                " data=DataFormat(logits_from=...) to AttributionPartitionCallback."
            )
        found = [passes.dimension(at) for at in range(len(points))]
    return [None if d is None else replace(p, samples=d) for p, d in zip(points, found, strict=True)]


def _tried(run: Any, make: Any, order: Tensor) -> list[Tensor] | None:
    """Return what a pass over these samples shows; None where there is none, as of a model of a fixed batch size."""
    try:
        seen: list[Tensor] = run(make(order))
    except Exception:  # whatever it is, the fit does not depend on such a batch
        return None
    return seen


def no_rows(point: LayerPoint, samples: int) -> str:
    """Return what to say of a layer without a row for each sample."""
    return (
        f"The {point.at} of layer '{point.name}' has no row for each of the {samples} samples of a batch, in their"
        " order, as where forward folds time steps into rows, or sorts samples; name another layer."
    )
