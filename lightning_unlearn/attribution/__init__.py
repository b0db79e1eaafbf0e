"""Activations and attributions of a layer. The only room that knows Captum and forward hooks; it leaves none behind."""

from lightning_unlearn.attribution.attributor import Attributor, MarginAttribution
from lightning_unlearn.attribution.captum_layers import ATTRIBUTION_METHODS, GRADIENT_X_ACTIVATION, check_method
from lightning_unlearn.attribution.hooks import record_activation, watch_output
from lightning_unlearn.attribution.layers import (
    BATCH_NORM,
    named_layers,
    neuron_count,
    neuron_dimension,
    neuron_means,
    plain_name,
    resolve_layer,
    response,
    sample_dimension,
)
from lightning_unlearn.attribution.loss_gradients import loss_gradients
from lightning_unlearn.attribution.oom import OOMBatchSplitter, is_out_of_memory, no_batch_splitting, slice_batch
from lightning_unlearn.attribution.trace import Forward, ForwardTrace, ModuleCall, check_reached, trace_forward

__all__ = [
    "ATTRIBUTION_METHODS",
    "BATCH_NORM",
    "GRADIENT_X_ACTIVATION",
    "Attributor",
    "Forward",
    "ForwardTrace",
    "MarginAttribution",
    "ModuleCall",
    "OOMBatchSplitter",
    "check_method",
    "check_reached",
    "is_out_of_memory",
    "loss_gradients",
    "named_layers",
    "neuron_count",
    "neuron_dimension",
    "neuron_means",
    "no_batch_splitting",
    "plain_name",
    "record_activation",
    "resolve_layer",
    "response",
    "sample_dimension",
    "slice_batch",
    "trace_forward",
    "watch_output",
]
