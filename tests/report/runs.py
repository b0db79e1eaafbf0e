"""Records of runs that never were, for the tests of the report."""

from dataclasses import replace

import torch

from lightning_unlearn.report import RunRecord
from lightning_unlearn.types import NeuronMask
from tests.callbacks.published import make_partition

HOSTILE = "<script>alert(1)</script>"
# What would end the element that the data are in, or begin a comment there.
BREAKING = "</script><img src=x onerror=alert(2)>\"'<!--<script>\u2028"
NAMES = [f"cat {HOSTILE}", "dog & co", BREAKING, "bird"]
# What is true of the samples below.
SUSPECTS, LABEL, INPUT = 40, 30, 10


def hostile_record(size=100, **changes):
    """Of the first 40 samples, all suspect, each fourth is of class 3, each fourth is suspected for its input."""
    label = torch.arange(size) % 4
    probability = torch.where(torch.arange(size) < SUSPECTS, torch.arange(size) / 100, torch.tensor(0.95))
    partition = make_partition(probability, label)
    reason = torch.where(partition.is_clean, 0, torch.where(label == 1, 2, 1)).to(torch.uint8)
    partition = replace(partition, reason=reason, warning=f"it is {HOSTILE}", layer=HOSTILE, noise_rate=0.375)
    cards = [
        {"kind": "text", "text": BREAKING},
        {"kind": "table", "rows": [[HOSTILE, BREAKING]]},
        {"kind": "fault", "text": HOSTILE},
    ]
    mask = NeuronMask(HOSTILE, torch.arange(6) > 1, torch.linspace(-1, 1, 6), torch.full((6,), 0.1))
    record = RunRecord(
        partition,
        (mask,),
        {index: cards[index % 3] for index in range(SUSPECTS)},
        summary={"advice": f"All is {HOSTILE}", "memorised": 0.4, "accuracy_before": 0.5, "accuracy_after": 0.75},
        rounds=[{"epoch": 1, "suspects": 40, "noise_rate": 0.4, "changed": 1.0}] * 2,
        class_names=NAMES,
        settings={HOSTILE: {HOSTILE: BREAKING}},
        versions={HOSTILE: HOSTILE},
        fit={"model": HOSTILE, "data": BREAKING},
        seconds={"fit": 10.0, HOSTILE: 2.0},
        curves={HOSTILE: [[0, 1.0], [1, 0.5]], "val_acc": [[0, 0.1], [1, 0.9]]},
        swaps=[1],
    )
    return replace(record, **changes)
