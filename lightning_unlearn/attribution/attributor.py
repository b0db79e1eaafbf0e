"""Attributes the margin of the given label in a batch, and the paper's largest attribution over the classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.attribution.captum_layers import GRADIENT_X_ACTIVATION, CaptumLayer, check_method
from lightning_unlearn.attribution.checkpointing import activation_checkpointing_off
from lightning_unlearn.attribution.gradient_x_activation import FastPath
from lightning_unlearn.attribution.hooks import record_activation, recording_paused
from lightning_unlearn.attribution.layers import LayerPoint, resolve_layer
from lightning_unlearn.attribution.oom import OOMBatchSplitter, is_out_of_memory, slice_batch
from lightning_unlearn.attribution.trace import Forward

# Rows on which the fast path is compared with Captum before it is used.
_REHEARSAL_ROWS = 4


@dataclass(frozen=True, eq=False)
class MarginAttribution:
    """Attribution of the label margin in one batch.

    Args:
        per_neuron: like the layer's activation with the samples first, attribution of the margin.
        logits: (B, C) float32, from the same forward pass.
        class_max: (B, D) float32, the paper's attribution, where it was asked for.
        watched: the activations of the other layers that were asked for, from the same forward pass.
    """

    per_neuron: Tensor
    logits: Tensor
    class_max: Tensor | None = None
    watched: tuple[Tensor, ...] = ()

    def total(self) -> Tensor:
        """Return (B,) float32, the sum over all neurons: how strongly the layer supports the given label."""
        return self.per_neuron.float().flatten(1).sum(dim=1)


class Attributor:
    """Attributes the logits of a model at one of its layers.

    Gradient x activation takes a fast path: one forward pass that is recorded from the layer on only. Before the first
    batch it is compared with Captum on a few rows, and where the two differ (the layer's input goes elsewhere too, or
    ``forward`` switches recording itself) Captum is used throughout. All other methods are Captum's own; those that
    compare with a baseline compare with an input of zeros. Nothing of a batch is kept; a batch that does not fit into
    memory is taken in parts.

    Args:
        model: holds the layer; call in eval mode, since samples of a batch must not influence each other.
        point: where to attribute.
        forward: from a batch's input to logits.
        method: one of :data:`ATTRIBUTION_METHODS`. Integrated gradients, conductance and internal influence take 16
            forward and backward passes (for ``class_max``: for every class), DeepLift one of twice the size.
        fast: False for Captum in every case.
        watch: other layers whose activations are read in the same forward pass.
        agree: from whether the fast path may be taken here to whether it may on every rank, where ranks meet in the
            passes and must take as many.

    Raises:
        ValueError: for an unknown method or layer.
    """

    def __init__(
        self,
        model: nn.Module,
        point: LayerPoint,
        forward: Forward,
        method: str = GRADIENT_X_ACTIVATION,
        *,
        fast: bool = True,
        watch: Sequence[LayerPoint] = (),
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._point = point
        self._layer = CaptumLayer(model, point, forward, check_method(method))
        self._fast_path = FastPath(resolve_layer(model, point.name), point, forward)
        self._watch = tuple(watch)
        for watched in self._watch:
            resolve_layer(model, watched.name)
        # None: to be seen at the first batch.
        self._is_fast: bool | None = None if fast and method == GRADIENT_X_ACTIVATION else False
        self._in_parts = OOMBatchSplitter()
        self._agree = agree

    def margin(self, x: Any, label: Tensor) -> MarginAttribution:
        """Return attribution of the given label's logit minus the strongest other logit.

        The strongest other class is that of the plain forward pass, also where a method looks at other inputs than x.

        Args:
            x: the model's input for B samples; a float tensor, or a tuple or dict of them, for the methods with a
                baseline.
            label: (B,) int64.

        Raises:
            TypeError: for an input without a baseline.
            ValueError: for a layer with several tensors, or one that is not called exactly once, or a model that
                DeepLift cannot attribute.
        """
        return self.attribute(x, label)

    def class_max(self, x: Any, label: Tensor, num_classes: int) -> Tensor:
        """Return the paper's attribution (step 2): the largest over the classes.

        For gradient x activation the maximum is taken on the gradient, as in the paper, for the other methods on the
        attribution.

        Args:
            x: the model's input for B samples.
            label: (B,) int64; only its length and device are used.
            num_classes: C, as many as the model has logits.

        Returns:
            (B, D) float32.
        """
        found = self.attribute(x, label, rows=True)
        if found.class_max is None or found.logits.shape[1] != num_classes:
            raise ValueError(f"Expected logits of {num_classes} classes, but got {found.logits.shape[1]}.")
        return found.class_max

    def attribute(self, x: Any, label: Tensor, *, rows: bool = False) -> MarginAttribution:
        """Return the margin's attribution and, with ``rows``, the paper's, from the same forward pass.

        Args:
            x: as in :meth:`margin`.
            label: (B,) int64.
            rows: whether to add ``class_max``.
        """

        def of_part(part: Any, of_label: Tensor) -> MarginAttribution:
            return self._attribute(part, of_label, rows)

        # Nothing is recorded in inference mode, not even where recording is asked for.
        with torch.inference_mode(False), activation_checkpointing_off():
            if self._is_fast is None:
                self._is_fast = self._rehearse(x, label)
            return _join(self._in_parts(of_part, x, label))

    def check_first_rows(self, x: Any, label: Tensor, *, rows: bool = False) -> None:
        """Attribute the first rows of a batch, to refuse what cannot be attributed before hours of training.

        Args:
            x: as in :meth:`margin`.
            label: (B,) int64.
            rows: whether ``class_max`` will be asked for.
        """
        self.attribute(*_first_rows(x, label), rows=rows)

    def _attribute(self, x: Any, label: Tensor, rows: bool) -> MarginAttribution:
        with ExitStack() as stack:
            takes = [stack.enter_context(record_activation(self._layer.model, watched)) for watched in self._watch]
            path = self._fast_path if self._is_fast else self._layer
            per_neuron, logits, class_max = path.attribute(x, label, rows)
            return MarginAttribution(per_neuron, logits, class_max, tuple(take() for take in takes))

    def _rehearse(self, x: Any, label: Tensor) -> bool:
        """Return whether the fast path says the same as Captum of the first rows."""
        with recording_paused():
            agrees = self._agree(all(self._in_parts(self._agrees, *_first_rows(x, label))))
        if not agrees:
            warnings.warn(
                f"Using full backpropagation (slower): the fast path from the {self._point} on disagrees with"
                " Captum, because the activation is used elsewhere or forward toggles gradients.",
                stacklevel=4,
            )
        return agrees

    def _agrees(self, x: Any, label: Tensor) -> bool:
        try:
            found, _, _ = self._fast_path.attribute(x, label, rows=False)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return False  # if the fault lies elsewhere, Captum's pass over the batch will say so
        expected, _, _ = self._layer.attribute(x, label, rows=False)
        tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 2e-2
        # Of a sample that is broken, or a model that has diverged, both say the same nothing.
        finite = expected.flatten(1).isfinite().all(dim=1)
        difference = (found[finite].float() - expected[finite].float()).norm()
        return bool(difference <= tolerance * expected[finite].float().norm())


def _first_rows(x: Any, label: Tensor) -> tuple[Any, Tensor]:
    """Return a few samples of a batch; all of one that cannot be taken apart."""
    first = slice(0, _REHEARSAL_ROWS)
    try:
        return slice_batch(x, first, len(label)), label[first]
    except ValueError:
        return x, label


def _join(parts: list[MarginAttribution]) -> MarginAttribution:
    if len(parts) == 1:
        return parts[0]
    rows = [part.class_max for part in parts if part.class_max is not None]
    return MarginAttribution(
        torch.cat([part.per_neuron for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat(rows) if rows else None,
        tuple(torch.cat(values) for values in zip(*(part.watched for part in parts), strict=True)),
    )
