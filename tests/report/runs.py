"""Records of runs that never were, for the tests of the report."""

from dataclasses import replace

import torch

from lightning_unlearn.report import RunRecord
from lightning_unlearn.results.mask import NeuronMask
from tests.callbacks.published import make_partition

HOSTILE = "<script>alert(1)</script>"
# What would end the element that the data are in, or begin a comment there.
BREAKING = "</script><img src=x onerror=alert(2)>\"'<!--<script>\u2028"
NAMES = [f"cat {HOSTILE}", "dog & co", BREAKING, "bird"]
# What is true of the samples below.
SUSPECTS, LABEL, INPUT = 40, 30, 10


def provenance_of(**finetuned):
    """The suspects of class 0 are re-labeled to class 1, the others dropped; a person has decided of 0, 1 and 50."""
    moved = [{"index": index, "given": 0, "new": 1} for index in range(0, SUSPECTS, 4)]
    dropped = [index for index in range(SUSPECTS) if index % 4]
    done = {"from_epoch": 1, "seed": 0, "dropped": dropped, "relabeled": moved, "weighed": False, **finetuned}
    return {
        "fits": [
            {
                "from_epoch": 0,
                "ranks": 2,
                "seed": 17,
                "versions": {HOSTILE: HOSTILE},
                "settings": {HOSTILE: {HOSTILE: BREAKING, "layers": ["one", 2.0, None]}},
            }
        ],
        "data": {"samples": 100, "fingerprint": HOSTILE},
        "review": {"path": BREAKING, "keep": [50], "drop": [1], "relabel": [0], "stale": 0},
        "done": {"prune": {"pruned": {HOSTILE: [0, 1]}, "note": HOSTILE}, "finetune": done},
    }


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
        summary={"advice": f"All is {HOSTILE}", "memorized": 0.4, "accuracy_before": 0.5, "accuracy_after": 0.75},
        rounds=[{"epoch": 1, "suspects": 40, "noise_rate": 0.4, "changed": 1.0}] * 2,
        class_names=NAMES,
        fit={"model": HOSTILE, "data": BREAKING},
        provenance=provenance_of(),
        seconds={"fit": 10.0, HOSTILE: 2.0},
        curves={HOSTILE: [[0, 1.0], [1, 0.5]], "val_acc": [[0, 0.1], [1, 0.9]]},
        swaps=[1],
    )
    return replace(record, **changes)
