"""What test_simulated_device.py runs in a process of its own."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_unlearn import UnlearnReport
from lightning_unlearn.pruning.criteria import Sensitivity
from tests.callbacks.simulated_device import SimulatedStrategy, install, waits
from tests.toys import Blobs, BlobsData, Toy, convnet, fit, trio

AT, EPOCHS, SIZE = 3, 5, 272
CASES: dict[str, dict[str, Any]] = {
    "auto, F-FT": {},
    "rlap, L-FT": {"recipe": "rlap", "min_class_fraction": 0.0, "finetune": {"mode": "layers"}},
    "label, relabel": {"recipe": "label", "finetune": {"on_noisy": "relabel"}},
    "passes, reweight, blind pruning": {
        "evidence_from": "eval_passes",
        "finetune": {"on_noisy": "reweight"},
        "prune": {"amount": 0.3, "criterion": Sensitivity(fdr_level=None), "max_val_drop": None},
    },
}


class WaitsOfSteps(Callback):
    """The waits within an epoch's steps, the first left out: what is brought once is no cost. Comes last."""

    def __init__(self) -> None:
        self.by_epoch: dict[int, Counter[str]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.before = waits.copy()
        self.by_epoch[trainer.current_epoch] = waits - self.before


def compare(folder: Path) -> None:
    """Writes what every case finds on the CPU and on the device, and what its steps wait for."""
    inside = install()
    found: dict[str, Any] = {}
    for name, options in CASES.items():
        clean = []
        for where in ("cpu", "device"):
            steps = WaitsOfSteps()
            callbacks = [*trio(AT, **options), UnlearnReport(folder / name), steps]
            kwargs = {"strategy": SimulatedStrategy(), "accelerator": "auto"} if where == "device" else {}
            with inside if where == "device" else nullcontext():
                module = Toy(convnet, _adam)
                fit(module, BlobsData(Blobs(SIZE, image=True)), callbacks, max_epochs=EPOCHS, **kwargs)
            clean.append(callbacks[0].partition.clean_probability.tolist())
        found[name] = {"clean": clean, "waits": steps.by_epoch}
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def _adam(module: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=1e-2)
