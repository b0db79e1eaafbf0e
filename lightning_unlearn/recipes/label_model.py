"""The model of true classes behind the given labels, fitted to the view of the evidence that tells most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.chunks import row_slices, softmax
from lightning_unlearn.functional.evidence import confident_disagreement
from lightning_unlearn.functional.lapse import Lapses, fit_lapses
from lightning_unlearn.functional.latent import LatentClasses, fit_latent_classes
from lightning_unlearn.functional.mixture import Reduce
from lightning_unlearn.functional.transition import MOST_HELD, LogNames, fit_transition, given_posterior, log_odds_of
from lightning_unlearn.recipes.views import View, views_of, whole_of
from lightning_unlearn.types import Evidence

# Label evidence. Likelihoods of Gaussians in many correlated coordinates are too sure of themselves: they are tempered
# where the transition matrix and the rate are estimated, and more so where they are added to the model's own logits,
# which under noise are not sure enough.
_TEMPER = 0.7
_WEIGHT = 0.15
_LOGITS = 1.5
# Logits of the first guess are sharpened, as a network under noise is unsure of what it knows.
_SHARPEN = 4.0
# Gate: disagreement of the most confident quarter, over the mean uncertainty that clean data would leave. Or, where
# that hides it, lapses of the labels: so many standard deviations of them, and such a share of all the disagreement.
# These two were chosen on small data sets, noisy and clean (benchmarks/results/README.md).
UNEXPLAINED = 1.5
_SURELY = 5.0
_OF_ALL = 1 / 4
# Of so many samples lapses would show; where there are none, less than _STRIKING times the uncertainty is no reason.
_MANY = 1000
_NONE = 2.0
# Below so many times the mean uncertainty the most confident quarter disagrees too seldom to speak of lapses.
_HARDLY = 0.1
# A shorter view is taken instead if it finds so many times as much unexplained, and either labels lapse in it or there
# is more than so much; less will do where other parts of training were memorised outright, if it is not much less sure.
_CLEARER = 1.25
_STRIKING = 3.0
_LESS_SURE_BY = 1.5

# A class is not known to the model if it predicts it of less than this share of the samples that are called so.
_SELDOM = 0.05

_NOT_NAMED = "some class is called by another's name more often than by its own, so nothing can be told"
NOT_KNOWN = "the model tells fewer than two classes, or than half of them, from the others, so nothing can be told"


@dataclass(frozen=True, eq=False)
class LabelModel:
    """What latent classes say of a data set.

    Args:
        log_odds: (n,), of the given label being right.
        predicted: (n,) int64, the likeliest true class without the given label.
        confidence: (n,), log-odds of that class.
        suggested: (n,) int64, the likeliest true class other than the given one.
        suggested_share: (n,) in [0, 1], its probability among those other classes.
        transition: (C, C), how the classes are called; with very many, (C,), how often by their own name.
        rate: share of labels that are wrong by the latent classes alone.
        uncertainty: share of the true classes that the latent classes expect to get wrong without the given label.
        disagreement: share of the most confident samples whose given label is not what is predicted.
        overall_disagreement: the same of all samples.
        samples: how many those are.
        lapses: of the given labels, by the score that ``predicted`` is the best of; None where disagreement and
            uncertainty leave nothing to ask.
        objection: why nothing can be told; empty if it can.
    """

    log_odds: Tensor
    predicted: Tensor
    confidence: Tensor
    suggested: Tensor
    suggested_share: Tensor
    transition: Tensor
    rate: float
    uncertainty: float
    disagreement: float
    overall_disagreement: float
    samples: float
    lapses: Lapses | None
    objection: str

    @property
    def finds_wrong_labels(self) -> bool:
        """The gate.

        A network that has hardly learned is often wrong where it is most confident. But then it is so as it says, at
        some temperature, and no label lapses.
        """
        lapses = self.lapses
        ruled_out = lapses is not None and self.samples >= _MANY and lapses.z < _NONE
        return self.clear_lapses is not None or (self.unexplained > UNEXPLAINED and not ruled_out)

    @property
    def clear_lapses(self) -> Lapses | None:
        """``lapses`` that say that labels are wrong which uncertainty, however large, does not explain; else None."""
        lapses = self.lapses
        is_clear = lapses is not None and lapses.z >= _SURELY and lapses.rate >= _OF_ALL * self.overall_disagreement
        return lapses if is_clear else None

    @property
    def is_striking(self) -> bool:
        """Whether it shows so much that a shorter view may do it, or one of what looks memorised."""
        return self.unexplained > _STRIKING or self.clear_lapses is not None

    @property
    def noise_rate(self) -> float:
        """``rate``, or that of the lapses where they show more: the more classes overlap, the more they explain."""
        lapses = self.clear_lapses
        return self.rate if lapses is None else max(self.rate, lapses.rate)

    @property
    def unexplained(self) -> float:
        """How many times as often the most confident samples disagree as uncertainty explains of the average one."""
        return 0.0 if self.objection else self.disagreement / max(self.uncertainty, 1e-9)


def label_model(evidence: Evidence, reduce: Reduce) -> LabelModel:
    """The latent classes of the view that shows wrong labels most clearly.

    That is not the one of most samples suspected, but the one in which the most confident samples disagree with their
    labels for the least reason. What was half memorised in the end speaks for wrong labels as if they were right; what
    was hardly learned yet is unsure of everything. Of several views of clean data some will look suspicious by chance,
    so a shorter view must be far clearer than a longer one.

    A network that predicts nearly all the given labels has memorised them, or next to none is wrong and it has learned.
    So where nothing is found without those parts of training, all of it is looked at.
    """
    views = views_of(evidence, reduce)
    longest = best = fit_view(views[0], evidence, reduce)
    for view in views[1:]:
        model = fit_view(view, evidence, reduce)
        sure = model.uncertainty <= _LESS_SURE_BY * longest.uncertainty
        if model.unexplained > _CLEARER * best.unexplained and (model.is_striking or (view.is_part and sure)):
            best = model
    if views[0].is_part and not best.finds_wrong_labels:
        whole = fit_view(whole_of(evidence), evidence, reduce)
        if whole.is_striking:
            return whole
    return best


def fit_view(view: View, evidence: Evidence, reduce: Reduce) -> LabelModel:
    """The model of true classes, fitted to one view of the evidence."""
    y, w = evidence.label, evidence.weight.double()
    basis, blocks, of_training = evidence.basis.double(), view.blocks, view.of_training
    rows = blocks.flatten(1)

    def first_guess(x: Tensor) -> Tensor:
        mean = x.reshape(len(x), -1, basis.shape[1])[:, :of_training].mean(dim=1)
        return softmax(_SHARPEN * mean.double() @ basis.T)

    classes = fit_latent_classes(rows, y, w, first_guess, evidence.num_classes, reduce=reduce)

    likelihood_of = _held(classes, rows)
    transition = fit_transition(lambda part: _TEMPER * likelihood_of(part), y, w, classes.transition, reduce=reduce)

    def score(part: slice, likelihood: Tensor) -> Tensor:
        return _WEIGHT * likelihood + _LOGITS * blocks[part, -2:].mean(dim=1).double() @ basis.T

    columns, sums, names = [], w.new_zeros(4), LogNames(transition)
    # In parts, as there are C numbers for every sample.
    for part in row_slices(len(y), evidence.num_classes, y.device):
        likelihood = likelihood_of(part)
        of_samples, of_part = _of_samples(likelihood, score(part, likelihood), y[part], names)
        sums += of_part @ w[part]
        columns.append(of_samples)
    number, wrong, unsure, differs = reduce(sums).tolist()
    log_odds, predicted, confidence, suggested, suggested_share = map(torch.cat, zip(*columns, strict=True))
    disagreement = confident_disagreement(
        confidence, predicted == y, predicted, evidence.weight, evidence.num_classes, reduce=reduce
    )
    uncertainty, objection = unsure / number, _objection(transition, predicted, y, w, reduce)
    # Only where it can matter, as it takes a while; every rank knows these numbers.
    lapses = None
    if not objection and _HARDLY * uncertainty < disagreement <= _STRIKING * uncertainty:
        lapses = fit_lapses(lambda part: score(part, likelihood_of(part)), y, w, evidence.num_classes, reduce=reduce)
    return LabelModel(
        log_odds=log_odds,
        predicted=predicted,
        confidence=confidence,
        suggested=suggested,
        suggested_share=suggested_share,
        transition=transition,
        rate=wrong / number,
        uncertainty=uncertainty,
        disagreement=disagreement,
        overall_disagreement=differs / number,
        samples=number,
        lapses=lapses,
        objection=objection,
    )


def _of_samples(
    likelihood: Tensor, score: Tensor, label: Tensor, names: LogNames
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Of some samples the first five columns of :class:`LabelModel`, and (4, n) to be summed over all of them.

    These are one, whether the label is wrong and how unsure the true class is by the latent classes alone, and whether
    the label is not what is predicted.
    """
    column = label.unsqueeze(1)
    wrong = 1 - given_posterior(_TEMPER * likelihood, label, names).gather(1, column).squeeze(1).exp()
    unsure = 1 - softmax(likelihood.clone()).amax(dim=1)
    posterior = given_posterior(score, label, names)
    predicted = score.argmax(dim=1)
    share, suggested = posterior.scatter(1, column, -torch.inf).softmax(dim=1).max(dim=1)
    columns = (log_odds_of(posterior, label), predicted, log_odds_of(score, predicted), suggested, share)
    return columns, torch.stack([torch.ones_like(wrong), wrong, unsure, (predicted != label).double()])


def _held(classes: LatentClasses, rows: Tensor) -> Callable[[slice], Tensor]:
    """From some of the rows to their log-likelihoods, which are asked for again and again: held if not too many."""
    if len(rows) * len(classes.prior) > MOST_HELD:
        return lambda part: classes.log_likelihood(rows[part])
    return classes.log_likelihood(rows).__getitem__


def _objection(transition: Tensor, predicted: Tensor, label: Tensor, weight: Tensor, reduce: Reduce) -> str:
    """Why classes and names cannot be told apart; empty if they can.

    A network that is dead, or has fallen back on the larger classes, calls all others wrong however they are labelled.
    """
    zeros = weight.new_zeros(len(transition))
    given, guessed = reduce(torch.stack([zeros.index_add(0, of, weight) for of in (label, predicted)]))
    if not _goes_by_own_name(transition)[given > 0].all():
        return _NOT_NAMED
    known = (guessed >= _SELDOM * given)[given > 0]
    return "" if known.sum() >= max(2, len(known) / 2) else NOT_KNOWN


def _goes_by_own_name(transition: Tensor) -> Tensor:
    """(C,) bool, whether a class has no other name more often than its own."""
    if transition.ndim == 2:
        return transition.diagonal() >= transition.amax(dim=1)
    return transition >= (1 - transition) / max(len(transition) - 1, 1)
