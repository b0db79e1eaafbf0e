"""What the benchmark of the repair compares, and how its networks are trained: numbers and names only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from benchmarks.cases import Case
from lightning_unlearn.pruning.criteria import Sensitivity

BASE, CONTINUE, FFT, RETRAIN, CE, ELR = "base", "continue", "F-FT", "retrain", "cross-entropy", "ELR"
# Re-labeling trains on more samples, so for more steps, than F-FT does: it has a control of its own.
RELABEL, CONTINUE_LONG = "relabel", "continue, steps of relabel"
KEEP = "F-FT keep"
# Controls from other weights than the base's, with the optimizer, schedule and steps of F-FT. The truly clean set is
# the most that any partition could come to.
RETRAIN_SHORT, SHRINK_ALL, CEILING = "retrain, same steps", "shrink, all data", "truly clean, retrained, same steps"
# What out-of-sample probabilities of five networks leave, retrained in full.
CLEANLAB = "cleanlab, retrain"
# The callbacks with their defaults in a fit from its start; new weights trained as long on what they kept; and on the
# truly clean set.
DEFAULT, RETRAIN_DEFAULT, CLEAN = "callbacks by default", "retrain on what they kept", "truly clean, retrained"
SHRINK_TO = 0.1
"""How much of the way from the start of the fit to the base's weights is left by "shrink, all data"."""


@dataclass(frozen=True)
class Plan:
    """How the networks of a case are trained.

    Chosen so that the base of ``fresh`` is near its best and that of ``memorized`` predicts most of the wrong labels,
    and, for the fine-tuning, on seed 0 of spoken-sym40 and cifar-human. The digits are the demo's, as they were. What
    fine-tunes, "continue", retraining, "cross-entropy" (of all the data) and ELR have the same optimizer; the last
    three with one cycle to zero. The plans of the large networks, of usual numbers and of 125 epochs in all, were not
    tried.

    Args:
        base_epochs: on all the data.
        repair_epochs: on the subset.
        base_lr: of the base's optimizer, Adam without weight decay.
        base_decays: whether it falls to zero in one cycle, or stays.
        mirror: whether images are mirrored and shifted.
        lr: of all that is not the base, at its highest.
        weight_decay: likewise, of AdamW; 0 makes it Adam.
        sgd: SGD with Nesterov momentum in place of both, with this weight decay for the base too.
        alone_epochs: of cross-entropy and ELR, after which there is no repair; None for as many as the base has.
        precision: of the Trainer.
    """

    base_epochs: int
    repair_epochs: int
    base_lr: float = 1e-3
    base_decays: bool = False
    mirror: bool = False
    lr: float = 3e-3
    weight_decay: float = 0.0
    sgd: bool = False
    alone_epochs: int | None = None
    precision: str = "bf16-mixed"

    @property
    def optimizer(self) -> Callable[[Any], torch.optim.Optimizer]:
        """Makes the optimizer of all that is not the base."""
        return self._sgd(self.lr) or partial(torch.optim.AdamW, lr=self.lr, weight_decay=self.weight_decay)

    @property
    def base_optimizer(self) -> Callable[[Any], torch.optim.Optimizer]:
        """Makes the base's."""
        return self._sgd(self.base_lr) or partial(torch.optim.Adam, lr=self.base_lr)

    def _sgd(self, lr: float) -> Callable[[Any], torch.optim.Optimizer] | None:
        settings = {"momentum": 0.9, "nesterov": True, "weight_decay": self.weight_decay}
        return partial(torch.optim.SGD, lr=lr, **settings) if self.sgd else None


FRESH, MEMORIZED = "fresh", "memorized"
REGIMES = (FRESH, MEMORIZED)
_DIGITS = Plan(40, 20, weight_decay=2.0, precision="32-true")
_LARGE = Plan(85, 40, base_lr=0.2, lr=0.2, weight_decay=5e-4, sgd=True, alone_epochs=125)
PLANS: dict[tuple[str, str], Plan] = {
    ("cifar", FRESH): Plan(12, 6, base_lr=3e-3, base_decays=True, mirror=True),
    ("cifar", MEMORIZED): Plan(24, 6),
    ("spoken", FRESH): Plan(8, 12),
    ("spoken", MEMORIZED): Plan(80, 12),
    ("digits", FRESH): replace(_DIGITS, base_epochs=8),
    ("digits", MEMORIZED): _DIGITS,
    ("features", FRESH): Plan(4, 12, lr=1e-3, precision="32-true"),
    ("features", MEMORIZED): Plan(40, 12, lr=1e-3, precision="32-true"),
    ("music-mv", FRESH): Plan(10, 20, lr=1e-3, precision="32-true"),
    ("music-mv", MEMORIZED): Plan(60, 20, lr=1e-3, precision="32-true"),
    ("hate", FRESH): Plan(2, 4, base_lr=3e-3, lr=3e-3, precision="32-true"),
    ("hate", MEMORIZED): Plan(8, 4, base_lr=3e-3, lr=3e-3, precision="32-true"),
    ("phon-15", FRESH): Plan(10, 20, lr=1e-3, precision="32-true"),
    ("phon-15", MEMORIZED): Plan(60, 20, lr=1e-3, precision="32-true"),
    ("large", FRESH): replace(_LARGE, base_decays=True, mirror=True),
    ("large", MEMORIZED): _LARGE,
}


def plan_of(case: Case, regime: str, *, fast: bool = False) -> Plan:
    """How the networks of a case are trained; ``fast`` only to see that everything runs."""
    plan = PLANS["large" if case.large else case.data, regime]
    return replace(plan, base_epochs=min(plan.base_epochs, 4), repair_epochs=3, alone_epochs=None) if fast else plan


@dataclass(frozen=True)
class Repair:
    """What a fit that goes on from the base's checkpoint does.

    Args:
        prune: arguments of the pruning; None for no pruning.
        mode: of the fine-tuning.
        on_noisy: likewise.
        rounds: whether there is a new partition after every third of the fine-tuning.
        knows_truth: whether the partition is the true one.
        warm_start: what the fine-tuning starts from.
    """

    prune: dict[str, Any] | None = field(default_factory=dict)
    mode: str = "full"
    on_noisy: str = "drop"
    rounds: bool = False
    knows_truth: bool = False
    warm_start: str = "auto"


# The same share of the neurons for every criterion, and none taken back, so that only the choice differs.
_BLIND = {"amount": 0.3, "max_val_drop": None}
REPAIRS: dict[str, Repair] = {
    FFT: Repair(),
    KEEP: Repair(warm_start="keep"),
    "F-FT start": Repair(warm_start="start"),
    "L-FT": Repair(mode="layers"),
    "F-FT no prune": Repair(prune=None),
    "prune random": Repair(prune={**_BLIND, "criterion": "random"}),
    "prune magnitude": Repair(prune={**_BLIND, "criterion": "magnitude"}),
    "prune ratio": Repair(prune={**_BLIND, "criterion": "mean_abs_ratio"}),
    "prune ours": Repair(prune={**_BLIND, "criterion": Sensitivity(fdr_level=None)}),
    "weigh": Repair(on_noisy="reweight"),
    RELABEL: Repair(on_noisy="relabel"),
    "rounds": Repair(rounds=True),
    "rounds + relabel": Repair(on_noisy="relabel", rounds=True),
    "rounds + weigh": Repair(on_noisy="reweight", rounds=True),
    "oracle": Repair(knows_truth=True),
}
# Arms that are trained for as many steps as another one was.
STEPS_OF = {CONTINUE: FFT, CONTINUE_LONG: RELABEL}
# In the order in which they are run: what others need comes first.
CONTROLS = (CONTINUE, RETRAIN_SHORT, RETRAIN, CEILING, SHRINK_ALL)
ARMS = (
    BASE,
    FFT,
    *CONTROLS,
    *(name for name in REPAIRS if name != FFT),
    CONTINUE_LONG,
    CLEANLAB,
    CE,
    ELR,
    DEFAULT,
    RETRAIN_DEFAULT,
    CLEAN,
)
