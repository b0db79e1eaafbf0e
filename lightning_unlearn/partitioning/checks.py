"""Whether the settings of a partition can work: with the model and its task."""

from __future__ import annotations

from lightning_unlearn.attribution import GRADIENT_X_ACTIVATION, ForwardTrace, check_reached, plain_name
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.recipes import Recipe
from lightning_unlearn.trainer.compat import MisconfigurationException
from lightning_unlearn.trainer.context import FitContext


def check_several_labels(layer: str | None, recipe: Recipe) -> None:
    """Refuse settings that multi-label tasks do not support.

    Raises:
        ValueError: naming the argument to leave out.
    """
    found = {
        "layer": (layer, layer is not None),
        "attribution_method": (recipe.attribution_method, recipe.attribution_method != GRADIENT_X_ACTIVATION),
        "recipe": (recipe.name, recipe.needs_neuron_attribution),
    }
    for name, (value, is_wrong) in found.items():
        if is_wrong:
            raise ValueError(
                f"Multi-label tasks are attributed at the input of the head by {GRADIENT_X_ACTIVATION}, but got"
                f" {name}={value!r}. Leave {name} out."
            )


def check_samples_first(point: LayerPoint | None, method: str) -> None:
    """Refuse a layer with the samples elsewhere for the methods that interpolate, whose passes count on them first.

    Raises:
        ValueError: naming both.
    """
    if point is not None and point.samples and method != GRADIENT_X_ACTIVATION:
        raise ValueError(
            f"attribution_method={method!r} needs a layer with the batch in dimension 0, but the {point.at} of"
            f" layer '{point.name}' has it in dimension {point.samples}. Name another layer, or set"
            f" attribution_method={GRADIENT_X_ACTIVATION!r}."
        )


def attributed_point(trace: ForwardTrace, layer: str | None, num_outputs: int) -> LayerPoint:
    """Return where the margin is attributed: at the output of the layer that was named, or at the input of the head.

    Raises:
        ValueError: where ``forward`` does not call that layer once.
    """
    point = LayerPoint(trace.head(num_outputs), "input") if layer is None else LayerPoint(plain_name(layer), "output")
    check_reached(trace, point)
    return point


def early_points(trace: ForwardTrace, batch: int, input_layer: str | None) -> list[LayerPoint]:
    """Return where corrupted inputs show: at the output of the named layer, or what the first block has seen.

    Of several, the first that has a row for each sample is to be taken.

    Raises:
        ValueError: where ``forward`` does not call the layer that was named once.
    """
    if input_layer is None:
        return trace.first_blocks(batch)
    point = LayerPoint(plain_name(input_layer), "output")
    check_reached(trace, point)
    return [point]


def check_classifies(fit: FitContext, trace: ForwardTrace) -> None:
    """Refuse networks that are trained in turns, such as a GAN, since ``forward`` may be any of them.

    Raises:
        MisconfigurationException: if one of several optimizers trains nothing that ``forward`` calls.
    """
    called = {parameter for call in trace.calls for parameter in call.module.parameters()}
    model, optimizers = fit.model, fit.optimizers
    called |= set(model.parameters(recurse=False))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if len(optimizers) > 1 and called.isdisjoint(trained):
            raise MisconfigurationException(
                f"Expected a single classifier, but forward of {type(model).__name__} calls no module trained by"
                f" optimizer {number} ({', '.join(names.get(p, '?') for p in trained[:3])}, ...), for example in a"
                " GAN. If forward is the classifier, name its layer with layer='...'."
            )
