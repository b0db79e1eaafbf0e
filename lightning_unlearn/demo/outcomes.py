"""What the demo has measured, as a table, and what it says: against which control, and a loss is called a loss."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_unlearn.demo.phases import WIDTH

BASE = "trained on all data"
REPAIR = "callbacks: partition, prune, fine-tune"
KEPT_WEIGHTS = "callbacks, weights kept (the paper's F-FT)"
CONTINUE = "control: train on, all data"
SHRINK_ALL = "control: shrink the weights, all data"
RETRAIN_SHORT = "control: retrain on the kept"
RETRAIN = "control: retrain on the kept, in full"
CEILING = "ceiling: retrain on the truly clean"
AUTO = "callbacks, which choose when to act"
ARMS = (BASE, REPAIR, KEPT_WEIGHTS, CONTINUE, SHRINK_ALL, RETRAIN_SHORT, CEILING, RETRAIN, AUTO)
CONTROLS = (CONTINUE, SHRINK_ALL, RETRAIN_SHORT, RETRAIN)

# What 399 test images tell apart, in points: of the mean over seeds, and of one seed (four images).
_POINTS, _POINTS_OF_ONE = 0.3, 1.0


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Args:
        base_epochs: epochs on all the data; long enough to memorize the wrong labels.
        repair_epochs: epochs on what the partition keeps.
        noise: share of wrong training labels.
        seeds: of the repeats: split, noise, initial weights and order.
    """

    base_epochs: int = 30
    repair_epochs: int = 15
    noise: float = 0.4
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """What one way to train came to.

    Args:
        accuracy: on the test set, in [0, 1].
        seconds: wall time; of the arms that start from the base, without the base.
        steps: optimizer steps, counted likewise.
    """

    accuracy: float
    seconds: float
    steps: int


@dataclass(frozen=True)
class Detection:
    """How well the partition found the wrong labels, judged with the true labels that it never saw.

    Args:
        auroc: of ``1 - clean_probability`` against the true mask.
        precision: share of the suspects whose label is wrong.
        recall: share of the wrong labels that are suspects.
        suggested_right: share of the suspects with a wrong label whose suggested label is right.
        noise_rate: as estimated; None where it is not known.
        memorized: share of the wrong labels that the base model predicts.
    """

    auroc: float
    precision: float
    recall: float
    suggested_right: float
    noise_rate: float | None
    memorized: float


@dataclass(frozen=True)
class Outcome:
    """One repeat."""

    seed: int
    arms: dict[str, Arm]
    detection: Detection


def table(settings: Settings, outcomes: Sequence[Outcome]) -> str:
    """Return the demo's last words: the data, every arm, the partition against the truth, and what was won."""
    seeds = f"mean ± standard deviation of {len(outcomes)} seeds" if len(outcomes) > 1 else f"seed {outcomes[0].seed}"
    lines = [
        f"Digits with {100 * settings.noise:.0f} % symmetric label noise: 1,198 training images; 200 to validate and",
        f"399 to test, with right labels; {seeds}.",
        "",
        f"{'':<{WIDTH}}{'test accuracy, %':>18}{'steps':>7}{'seconds':>9}",
        _row(outcomes, BASE, f"{BASE}, {settings.base_epochs} epochs"),
        "from these weights, same steps and schedule:",
        *(_row(outcomes, name) for name in (REPAIR, KEPT_WEIGHTS, CONTINUE, SHRINK_ALL)),
        "from new weights, same steps and schedule:",
        *(_row(outcomes, name) for name in (RETRAIN_SHORT, CEILING)),
        f"from new weights, {settings.base_epochs} and {settings.base_epochs + settings.repair_epochs} epochs:",
        *(_row(outcomes, name) for name in (RETRAIN, AUTO)),
        "",
        *_found(outcomes),
        "",
        *_won(outcomes),
    ]
    return "\n".join(lines)


def _row(outcomes: Sequence[Outcome], name: str, title: str = "") -> str:
    arms = [outcome.arms[name] for outcome in outcomes]
    accuracy = _spread([100 * arm.accuracy for arm in arms], 1)
    steps, seconds = (statistics.mean(getattr(arm, field) for arm in arms) for field in ("steps", "seconds"))
    return f"{title or f'  {name}':<{WIDTH}}{accuracy:>18}{steps:>7.0f}{seconds:>9.1f}"


def _found(outcomes: Sequence[Outcome]) -> list[str]:
    def of(name: str) -> str:
        return _spread([100 * getattr(outcome.detection, name) for outcome in outcomes], 1)

    return [
        f"Partition after the base, which predicts {of('memorized')} % of the wrong labels:",
        f"precision {of('precision')} %, recall {of('recall')} %, AUROC {of('auroc')} %;",
        f"estimated noise rate {of('noise_rate')} %; suggested label right for {of('suggested_right')} %.",
    ]


def _won(outcomes: Sequence[Outcome]) -> list[str]:
    """Say what the callbacks won against training on and the strongest control, and what was left to win."""
    strongest = max(CONTROLS, key=lambda name: _mean(outcomes, name))
    lines = [f"Against training on: {_difference(outcomes, CONTINUE)}."]
    if strongest != CONTINUE:
        share = statistics.mean(outcome.arms[REPAIR].steps / outcome.arms[strongest].steps for outcome in outcomes)
        cost = "" if abs(share - 1) < 0.05 else f", for {share:.2f} of its steps"
        lines.append(f"Against the strongest control ({_plain(strongest)}): {_difference(outcomes, strongest)}{cost}.")
    left = 100 * (_mean(outcomes, CEILING) - _mean(outcomes, REPAIR))
    lines.append(f"The ceiling ({_plain(CEILING)}) is {abs(left):.1f} points {'above' if left >= 0 else 'below'} it.")
    return lines


def _mean(outcomes: Sequence[Outcome], name: str) -> float:
    return statistics.mean(outcome.arms[name].accuracy for outcome in outcomes)


def _plain(name: str) -> str:
    return name.partition(": ")[2]


def _difference(outcomes: Sequence[Outcome], other: str) -> str:
    """Return the difference on the same seeds, in points, and what to call it."""
    points = [100 * (outcome.arms[REPAIR].accuracy - outcome.arms[other].accuracy) for outcome in outcomes]
    mean = statistics.mean(points)
    least = _POINTS_OF_ONE if len(points) == 1 else max(_POINTS, statistics.stdev(points))
    shown = f"{mean:+.1f} points" if len(points) == 1 else f"{mean:+.1f} ± {statistics.stdev(points):.1f} points"
    return f"{shown}, {'no difference to speak of' if abs(mean) < least else 'a gain' if mean > 0 else 'a loss'}"


def _spread(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"
