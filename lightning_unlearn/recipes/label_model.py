"""The model of true classes behind the given labels, and the view of the evidence that it is fitted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.functional.evidence import confident_disagreement
from lightning_unlearn.functional.latent import (
    LatentClasses,
    LogNames,
    fit_latent_classes,
    fit_transition,
    given_posterior,
    log_odds_of,
    rows_at_a_time,
)
from lightning_unlearn.functional.mixture import Reduce
from lightning_unlearn.types import Evidence

# Label evidence. Likelihoods of Gaussians in many correlated coordinates are too sure of themselves: they are tempered
# where the transition matrix and the rate are estimated, and more so where they are added to the model's own logits,
# which under noise are not sure enough.
_TEMPER = 0.7
_WEIGHT = 0.15
_LOGITS = 1.5
# Logits of the first guess are sharpened, as a network under noise is unsure of what it knows.
_SHARPEN = 4.0
# Log-likelihoods, of each sample under each class, that are held in double precision: 128 MiB.
_MOST_HELD = 2**24
# Share of the given labels that a part of training must predict to count as memorised.
MEMORISED = 0.9
# A shorter view is taken instead if it finds so many times as much unexplained, and more than so much; less will do
# where other parts of training were memorised outright, if it is not much less sure.
_CLEARER = 1.25
_STRIKING = 3.0
_LESS_SURE_BY = 1.5

# A class is not known to the model if it predicts it of less than this share of the samples that are called so.
_SELDOM = 0.05

_NOT_NAMED = "some class is called by another's name more often than by its own, so nothing can be told"
_NOT_KNOWN = "the model tells fewer than two classes, or than half of them, from the others, so nothing can be told"


def rival_of(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The class other than the given one that the model was most for on the whole, and its share among the others.

    Returns:
        (n,) int64 and (n,) float32 in [0, 1].
    """
    scores = evidence.attribution.mean(dim=1) @ evidence.basis.T
    share, rival = scores.scatter(1, evidence.label.unsqueeze(1), -torch.inf).softmax(dim=1).max(dim=1)
    return rival, share


@dataclass(frozen=True, eq=False)
class View:
    """A part of what a sample's class attributions were, early and late and in the end.

    Args:
        blocks: (n, P', r), at most three: two of training, one of the last pass.
        of_training: how many of them are averages over training.
        is_part: whether the rest was left out because it was memorised.
    """

    blocks: Tensor
    of_training: int
    is_part: bool = False


def views_of(evidence: Evidence, reduce: Reduce) -> list[View]:
    """What may be looked at: training up to the end of one of its phases, with or without the last pass, longest first.

    A network that has memorised its labels repeats them, right or wrong. So views that end in a block which predicts
    nearly all the given labels are left out, but for the shortest one, which comes from the time before.
    """
    blocks, w = evidence.attribution, evidence.weight.double()
    agrees = torch.stack(
        [
            w.sum(),
            *(w @ ((block @ evidence.basis.T).argmax(1) == evidence.label).double() for block in blocks.unbind(1)),
        ]
    )
    agrees = reduce(agrees)
    *informs, last_informs = (agrees[1:] <= MEMORISED * agrees[0]).tolist()
    last = blocks[:, -1:]
    if not informs:
        return [View(last, 1)]
    views, is_part = [], not (last_informs and all(informs))
    for phases in range(len(informs), 0, -1):
        if phases > 1 and not informs[phases - 1]:
            continue
        halves = [part.mean(dim=1) for part in blocks[:, :phases].tensor_split(2, dim=1) if part.shape[1]]
        of_training = torch.stack(halves, dim=1)
        if last_informs:
            views.append(View(torch.cat([of_training, last], dim=1), len(halves), is_part))
        views.append(View(of_training, len(halves), is_part))
    return views


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
    objection: str

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
    """
    views = views_of(evidence, reduce)
    longest = best = fit_view(views[0], evidence, reduce)
    for view in views[1:]:
        model = fit_view(view, evidence, reduce)
        striking = model.unexplained > _STRIKING
        sure = model.uncertainty <= _LESS_SURE_BY * longest.uncertainty
        if model.unexplained > _CLEARER * best.unexplained and (striking or (view.is_part and sure)):
            best = model
    return best


def fit_view(view: View, evidence: Evidence, reduce: Reduce) -> LabelModel:
    """The model of true classes, fitted to one view of the evidence."""
    y, w = evidence.label, evidence.weight.double()
    basis, blocks, of_training = evidence.basis.double(), view.blocks, view.of_training
    rows = blocks.flatten(1)

    def first_guess(x: Tensor) -> Tensor:
        mean = x.reshape(len(x), -1, basis.shape[1])[:, :of_training].mean(dim=1)
        return (_SHARPEN * mean.double() @ basis.T).softmax(dim=1)

    classes = fit_latent_classes(rows, y, w, first_guess, evidence.num_classes, reduce=reduce)

    likelihood_of = _held(classes, rows)
    transition = fit_transition(lambda part: _TEMPER * likelihood_of(part), y, w, classes.transition, reduce=reduce)
    columns, sums = [], w.new_zeros(3)
    # In parts, as there are C numbers for every sample.
    length, names = rows_at_a_time(evidence.num_classes, y.device), LogNames(transition)
    for first in range(0, len(y), length):
        part = slice(first, first + length)
        label, likelihood = y[part].unsqueeze(1), likelihood_of(part)
        wrong = 1 - given_posterior(_TEMPER * likelihood, y[part], names).gather(1, label).squeeze(1).exp()
        unsure = 1 - likelihood.softmax(dim=1).amax(dim=1)
        sums += torch.stack([torch.ones_like(wrong), wrong, unsure]) @ w[part]
        score = _WEIGHT * likelihood + _LOGITS * blocks[part, -2:].mean(dim=1).double() @ basis.T
        posterior = given_posterior(score, y[part], names)
        predicted = score.argmax(dim=1)
        share, suggested = posterior.scatter(1, label, -torch.inf).softmax(dim=1).max(dim=1)
        columns.append((log_odds_of(posterior, y[part]), predicted, log_odds_of(score, predicted), suggested, share))
    number, total_wrong, total_unsure = reduce(sums).tolist()
    log_odds, predicted, confidence, suggested, suggested_share = map(torch.cat, zip(*columns, strict=True))
    disagreement = confident_disagreement(
        confidence, predicted == y, predicted, evidence.weight, evidence.num_classes, reduce=reduce
    )
    return LabelModel(
        log_odds=log_odds,
        predicted=predicted,
        confidence=confidence,
        suggested=suggested,
        suggested_share=suggested_share,
        transition=transition,
        rate=total_wrong / number,
        uncertainty=total_unsure / number,
        disagreement=disagreement,
        objection=_objection(transition, predicted, y, w, reduce),
    )


def _held(classes: LatentClasses, rows: Tensor) -> Callable[[slice], Tensor]:
    """From some of the rows to their log-likelihoods, which are asked for again and again: held if not too many."""
    if len(rows) * len(classes.prior) > _MOST_HELD:
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
    return "" if known.sum() >= max(2, len(known) / 2) else _NOT_KNOWN


def _goes_by_own_name(transition: Tensor) -> Tensor:
    """(C,) bool, whether a class has no other name more often than its own."""
    if transition.ndim == 2:
        return transition.diagonal() >= transition.amax(dim=1)
    return transition >= (1 - transition) / max(len(transition) - 1, 1)
