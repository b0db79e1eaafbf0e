"""What a partition is held against: scores of the same fit without us, and cleanlab in-sample and out-of-sample.

None of it depends on what the partition does, so it is kept in a cache. The weights of a fit with the callback are bit
for bit those without it, so the scores after an epoch are those of the network that the partition has seen; a fit that
takes minutes is run once, with both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler, WeightedRandomSampler

from benchmarks.problems import Problem
from benchmarks.sources import in_layout
from lightning_unlearn.functional import label_margin

FOLDS = 5
SCORES = ("aum", "loss", "margin")
OUT_OF_FOLD = ("folds", "logistic")
_EVAL_BATCH = 500
_MOST_STEPS = 100  # of the logistic regression


class _Remembering:
    """Keeps the order in which an epoch was drawn."""

    order: list[int]

    def __iter__(self) -> Iterator[int]:
        self.order = list(super().__iter__())  # type: ignore[misc]
        yield from self.order


class _RememberingShuffle(_Remembering, RandomSampler):
    pass


class _RememberingWeights(_Remembering, WeightedRandomSampler):
    pass


@torch.no_grad()
def predictions(trainer: L.Trainer, model: L.LightningModule, x: Tensor) -> Tensor:
    """(N, C) logits in eval mode, on the CPU."""
    was_training = model.training
    model.eval()
    parts = []
    for part in x.split(_EVAL_BATCH):
        with trainer.precision_plugin.forward_context():
            parts.append(model(in_layout(part.to(model.device))).float().cpu())
    model.train(was_training)
    return torch.cat(parts)


class Recorder(L.Callback):
    """Scores of every sample after each epoch: the higher the more suspect.

    Args:
        problem: that is fitted, with the recorder's sampler.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.sampler = problem.sampler(problem.label, _RememberingShuffle, _RememberingWeights)
        self.scores: dict[str, list[Tensor]] = {name: [] for name in SCORES}
        self.last = torch.zeros(0)
        self.seconds = 0.0
        self._step = torch.zeros(0)
        self._margin = torch.zeros(0)
        self._sum = torch.zeros(len(problem.label))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads what the training steps say."""

        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            self._step = output.detach().float().cpu()

        pl_module.register_forward_hook(keep)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing has been drawn yet."""
        self._margin = torch.full((len(self.problem.label),), torch.nan)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """By dataset index."""
        index = torch.tensor(self.sampler.order[batch_idx * self.problem.batch :][: len(self._step)])
        self._margin[index] = label_margin(self._step, self.problem.label[index])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A pass in eval mode, whose time is no part of the fit's."""
        started, label = time.process_time(), self.problem.label
        self.last = predictions(trainer, pl_module, self.problem.x)
        margin = label_margin(self.last, label)
        # A sampler with replacement leaves some out.
        self._sum += torch.where(self._margin.isnan(), margin, self._margin)
        self.scores["aum"].append(-self._sum / (trainer.current_epoch + 1))
        self.scores["loss"].append(torch.nn.functional.cross_entropy(self.last, label, reduction="none"))
        self.scores["margin"].append(-margin)
        self.seconds += time.process_time() - started

    def found(self, seconds: float) -> dict[str, Any]:
        """What is kept of a fit that took so many seconds with all that was read."""
        scores = {name: torch.stack(values) for name, values in self.scores.items()}
        cleanlab = cleanlab_on(self.problem.label, self.last.softmax(dim=1))
        return {**scores, "cleanlab": cleanlab, "seconds": seconds - self.seconds}


def cleanlab_on(label: Tensor, probability: Tensor) -> dict[str, Tensor]:
    """What cleanlab makes of predicted probabilities: a score, the higher the more suspect, and its issues."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    present, given = torch.unique(label, return_inverse=True)
    among = probability[:, present].double().clamp(min=1e-12)
    rows = (among / among.sum(dim=1, keepdim=True)).numpy()
    score = get_label_quality_scores(given.numpy(), rows, method="normalized_margin")
    flagged = find_label_issues(given.numpy(), rows, n_jobs=1)
    return {"score": torch.from_numpy(-score).float(), "flagged": torch.from_numpy(np.asarray(flagged))}


def plain_fit(problem: Problem, seed: int) -> dict[str, Any]:
    """The fit without us: scores after each epoch, cleanlab in-sample at its end, and its seconds."""
    L.seed_everything(seed, verbose=False)
    model, recorder, started = problem.network(), Recorder(problem), time.process_time()
    problem.fit(model, problem.loader(sampler=recorder.sampler), [recorder])
    found = recorder.found(time.process_time() - started)
    return found | {"weight": next(model.parameters()).detach().double().sum().item()}


def _out_of_fold(problem: Problem, seed: int) -> Tensor:
    """(N, C) probabilities by networks that were trained without the sample."""
    fold = torch.randperm(len(problem.label), generator=torch.Generator().manual_seed(seed)) % FOLDS
    probability = torch.zeros(0)
    for k in range(FOLDS):
        L.seed_everything(seed * FOLDS + k, verbose=False)
        model = problem.network()
        trainer = problem.fit(model, problem.loader(kept=fold != k), [])
        said = predictions(trainer, model, problem.x[fold == k]).softmax(dim=1)
        if not len(probability):
            probability = torch.zeros(len(fold), said.shape[1])
        probability[fold == k] = said
    return probability


def _features(x: Tensor) -> Any:
    """What a logistic regression takes: columns of variance one, of hashed texts TF-IDF."""
    if x.is_floating_point():
        return ((x - x.mean(dim=0)) / x.std(dim=0).clamp(min=1e-6)).numpy()
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfTransformer

    row, column = (x > 0).nonzero(as_tuple=True)
    words = x[row, column]
    counts = csr_matrix((np.ones(len(words)), (row.numpy(), words.numpy())), shape=(len(x), int(x.max()) + 1))
    return TfidfTransformer(sublinear_tf=True).fit_transform(counts)


def _logistic(problem: Problem, seed: int) -> Tensor:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import KFold, cross_val_predict

    present, given = torch.unique(problem.label, return_inverse=True)
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    model = LogisticRegression(max_iter=_MOST_STEPS)
    found = cross_val_predict(model, _features(problem.x), given.numpy(), cv=folds, method="predict_proba")
    probability = torch.zeros(len(given), int(present[-1]) + 1)
    probability[:, present] = torch.from_numpy(found).float()
    return probability


def folds(problem: Problem, seed: int) -> dict[str, Any]:
    """Cleanlab on five networks' out-of-sample probabilities."""
    return _judged_out_of_fold(problem, seed, _out_of_fold)


def logistic(problem: Problem, seed: int) -> dict[str, Any]:
    """Cleanlab on those of five logistic regressions on the network's inputs."""
    return _judged_out_of_fold(problem, seed, _logistic)


def _judged_out_of_fold(problem: Problem, seed: int, find: Callable[[Problem, int], Tensor]) -> dict[str, Any]:
    started = time.process_time()
    probability = find(problem, seed)
    return {"seconds": time.process_time() - started, "cleanlab": cleanlab_on(problem.label, probability)}


PEERS: dict[str, Callable[[Problem, int], dict[str, Any]]] = {"plain": plain_fit, "folds": folds, "logistic": logistic}


def peer(name: str, problem: Problem, seed: int, cache: Path) -> dict[str, Any]:
    """One of :data:`PEERS`, from the cache if it is there."""
    file = cache / f"{problem.name.replace(' ', '_')}_{seed}_{name}.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(PEERS[name](problem, seed), part)
        part.rename(file)
    return dict(torch.load(file, weights_only=True))
