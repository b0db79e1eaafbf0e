"""What attribution costs, against a plain inference pass over the same data.

Run from a checkout::

    python -m benchmarks.attribution --out attribution.json
    python -m benchmarks.attribution --device cuda --batch 512 --repeats 50

Five ways to go over the same batches, in turns, so that whatever else the machine does meets all of them alike:

- ``inference``: a forward pass without recording.
- ``margin``: our gradient x activation of the label margin.
- ``margin + class_max``: that and the paper's attribution for all classes, from one forward pass.
- ``captum margin``: Captum's ``LayerGradientXActivation`` of the margin, called plainly.
- ``C backward``: a forward pass that is recorded from end to end and a full backward pass for every class.

The ratios are medians over the repeats of the ratio within a repeat. The last way, many times slower than the others,
is taken in every fifth repeat only. On a CPU that others use too, the ratios of processor time are the steadier ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn

from benchmarks.models import cifar_classifier
from lightning_unlearn.attribution import Attributor, resolve_layer
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.functional import label_margin
from lightning_unlearn.utilities.files import target_file

CLASSES = 10
SLOW, SLOW_EVERY = "C backward", 5
SamplingMode = Callable[[Tensor, Tensor], Any]


def small_cnn() -> tuple[nn.Module, LayerPoint]:
    """The small network of the CPU scale, attributed where the callback does by default: at the head's input."""
    return cifar_classifier(), LayerPoint("head", "input")


def resnet18() -> tuple[nn.Module, LayerPoint]:
    """Torchvision's network, attributed at the head's input."""
    from torchvision.models import resnet18 as build  # not needed for the small network

    return build(num_classes=CLASSES), LayerPoint("fc", "input")


def resnet18_last_block() -> tuple[nn.Module, LayerPoint]:
    """Torchvision's network, attributed at a feature map that a block follows."""
    return resnet18()[0], LayerPoint("layer4.0")


CASES = {"small_cnn": (small_cnn, 256), "resnet18": (resnet18, 64), "resnet18_layer4.0": (resnet18_last_block, 64)}


def ways(model: nn.Module, point: LayerPoint) -> dict[str, SamplingMode]:
    """From a batch of images and labels to whatever is measured, by name."""
    module, at_input = resolve_layer(model, point.name), point.at == "input"
    attributor = Attributor(model, point, model)

    def inference(x: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    def captum_margin(x: Tensor, label: Tensor) -> Any:
        method = LayerGradientXActivation(lambda images: label_margin(model(images), label), module)
        return method.attribute(x, attribute_to_layer_input=at_input)

    def full_backward(x: Tensor, label: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []

        def keep(value: Tensor) -> None:
            value.retain_grad()
            kept.append(value)

        if at_input:
            handle = module.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
        else:
            handle = module.register_forward_hook(lambda _, __, output: keep(output))
        logits = model(x)
        handle.remove()
        found = []
        for c in range(logits.shape[1]):
            model.zero_grad()
            kept[0].grad = None
            logits[:, c].sum().backward(retain_graph=c < logits.shape[1] - 1)
            found.append(kept[0].grad.clone())
        return found

    return {
        "inference": inference,
        "margin": attributor.margin,
        "margin + class_max": lambda x, label: attributor.attribute(x, label, rows=True),
        "captum margin": captum_margin,
        SLOW: full_backward,
    }


def seconds(way: SamplingMode, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[float, float]:
    """Of one pass over the batches: on the clock, and of this process's processor time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter(), time.process_time()
    for x, label in batches:
        way(x, label)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every repeat and way, and what they come to."""
    torch.manual_seed(args.seed)
    build, batch = CASES[case]
    batch, device = args.batch or batch, torch.device(args.device)
    model, point = build()
    model.to(device).eval()
    batches = [
        (torch.randn(batch, 3, 32, 32, device=device), torch.randint(CLASSES, (batch,), device=device))
        for _ in range(args.batches)
    ]
    candidates = ways(model, point)
    for way in candidates.values():
        seconds(way, batches[:1], device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for repeat in range(args.repeats):
        # Every other time backwards, so that none always follows the same one.
        for name in list(candidates)[:: 1 if repeat % 2 == 0 else -1]:
            if name != SLOW or repeat % SLOW_EVERY == 0:
                times[name].append(seconds(candidates[name], batches, device))
    return {
        "case": case,
        "layer": str(point),
        "batch": batch,
        "batches": args.batches,
        "repeats": args.repeats,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "load_average": os.getloadavg(),
        "ways": {name: summary(name, times) for name in times},
        "seconds": times,
    }


def summary(name: str, times: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Of one way: median seconds, and the medians of the ratios within a repeat."""
    slow, every = times[SLOW], 1 if name == SLOW else SLOW_EVERY
    plain = times["inference"][:: SLOW_EVERY if name == SLOW else 1]
    return {
        "median_seconds": statistics.median(clock for clock, _ in times[name]),
        "ratio_to_inference": median_ratio(times[name], plain, 0),
        "processor_ratio_to_inference": median_ratio(times[name], plain, 1),
        "full_backwards_over": median_ratio(slow, times[name][::every], 0),
    }


def median_ratio(values: list[tuple[float, float]], others: list[tuple[float, float]], which: int) -> float:
    """Of the pairs of one repeat: 0 for the clock, 1 for processor time."""
    return statistics.median(value[which] / other[which] for value, other in zip(values, others, strict=True))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a line for every case and way."""
    lines = [
        "| case | layer | batch | way | ms per batch | x inference | x inference, processor time | C backward take |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in results:
        for name, way in found["ways"].items():
            lines.append(
                f"| {found['case']} | {found['layer']} | {found['batch']} | {name} |"
                f" {1000 * way['median_seconds'] / found['batches']:.2f} | {way['ratio_to_inference']:.3f} |"
                f" {way['processor_ratio_to_inference']:.3f} | {way['full_backwards_over']:.1f} x |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append", help="one of them; may be repeated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="rows; by default 256 for the small network, 64 for the others")
    parser.add_argument("--batches", type=int, default=2, help="batches in a repeat")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON with the seconds of every repeat")
    args = parser.parse_args()
    results = [measure(case, args) for case in args.case or CASES]
    print(table(results))
    if args.out:
        target_file(args.out).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
