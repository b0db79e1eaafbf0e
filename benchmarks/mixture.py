"""Time and likelihood of the two-component mixture, beside scikit-learn's: a part of :mod:`benchmarks.speed`.

All fits of a repeat follow each other in the same process, so that they meet the same load.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sklearn.mixture import GaussianMixture as SklearnMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from lightning_unlearn.functional import GaussianMixture, fit_mixture, standardize

SEED = 0


def attributions(n: int, dimension: int, device: str) -> Tensor:
    """Rows (n, D) float32 like standardized attributions: two Gaussians near each other, with correlated columns.

    A third of the rows is of the second component, whose mean lies 3 standard deviations off in one direction, and
    whose covariance is 1 to 2 times that of the first along the other's axes.
    """
    generator = torch.Generator().manual_seed(SEED)
    mixing = torch.randn(dimension, dimension, generator=generator) / dimension**0.5 + 0.5 * torch.eye(dimension)
    shift = torch.randn(dimension, generator=generator)
    shift *= 3 / shift.norm()
    wider = (1 + torch.rand(dimension, generator=generator)).sqrt()
    rows = torch.empty(n, dimension)
    for chunk in torch.split(rows, 65_536):  # in place: 1.28 million rows are 1.3 GB
        second = (torch.rand(len(chunk), 1, generator=generator) < 1 / 3).float()
        source = torch.randn(chunk.shape, generator=generator)
        chunk.copy_((source * (1 + second * (wider - 1)) + second * shift) @ mixing)
    return standardize(rows, torch.ones(n)).to(device)


def timed(fit: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds of all threads, and what ``fit`` returns."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    wait()
    wall, processor = time.perf_counter(), time.process_time()
    result = fit()
    wait()
    return time.perf_counter() - wall, time.process_time() - processor, result


def mean_log_likelihood(mixture: GaussianMixture, rows: Tensor) -> float:
    """In nats, in double precision for every fit: a score in float32 would differ by its rounding."""
    return sum(float(mixture.log_prob(chunk).logsumexp(dim=1).sum()) for chunk in torch.split(rows, 16_384)) / len(rows)


def ours(rows: Tensor) -> dict[str, float]:
    """One fit of ours."""
    weight = torch.ones(len(rows), device=rows.device)
    wall, processor, mixture = timed(lambda: fit_mixture(rows, weight), rows.device.type)
    likelihood = mean_log_likelihood(mixture, rows)
    return {"wall": wall, "processor": processor, "steps": mixture.n_iter, "log_likelihood": likelihood}


def theirs(rows: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """One fit of scikit-learn's, with its defaults, on the CPU of the same machine."""
    array = rows.cpu().to(dtype).numpy()
    model = SklearnMixture(2, covariance_type="full", tol=1e-3, reg_covar=1e-6, n_init=1, random_state=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where 100 steps do not suffice; the table has the steps
        wall, processor, _ = timed(lambda: model.fit(array), "cpu")
    fitted = (torch.from_numpy(x).double() for x in (model.weights_, model.means_, model.covariances_))
    likelihood = mean_log_likelihood(GaussianMixture(*fitted), rows.cpu())
    return {"wall": wall, "processor": processor, "steps": model.n_iter_, "log_likelihood": likelihood}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the repeats, and seconds per EM step."""
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return middle | {"wall_per_step": middle["wall"] / middle["steps"]}


def compare(total: int = 50_000, dimension: int = 256, *, device: str = "cpu", repeats: int = 3) -> dict[str, Any]:
    """Ours and scikit-learn's on the same rows, in turns, with as many threads as torch has.

    Args:
        total: rows.
        dimension: columns.
        device: of ours.
        repeats: of each.
    """
    rows = attributions(total, dimension, device)
    fits = {
        "ours": lambda: ours(rows),
        "scikit-learn, float32 rows": lambda: theirs(rows, torch.float32),
        "scikit-learn, float64 rows": lambda: theirs(rows, torch.float64),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in fits}
    with threadpool_limits(torch.get_num_threads()):
        for _ in range(repeats):
            for name, fit in fits.items():
                runs[name].append(fit())
    table = {name: summary(of_name) for name, of_name in runs.items()}
    base = table["ours"]
    print(f"\n{total:,} x {dimension}, median of {repeats}\n")
    print(
        "| fit | wall s | processor s | steps | wall s per step | mean log-likelihood | wall / ours | per step / ours |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name} | {row['wall']:.2f} | {row['processor']:.2f} | {row['steps']:.0f} | {row['wall_per_step']:.3f}"
            f" | {row['log_likelihood']:.4f} | {row['wall'] / base['wall']:.2f}"
            f" | {row['wall_per_step'] / base['wall_per_step']:.2f} |"
        )
    return {"rows": total, "dim": dimension, "summary": table, "runs": runs}
