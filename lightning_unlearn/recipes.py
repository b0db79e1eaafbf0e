"""From evidence to the probability that a sample is clean, by name.

A recipe is a function from :class:`~lightning_unlearn.types.Evidence`, one rank's share of it, and a function that sums
over ranks, to a :class:`Verdict`. None needs a Trainer, a noise mask, a clean set or a noise rate.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.functional.evidence import confident_disagreement, shift_to_rate
from lightning_unlearn.functional.latent import (
    LatentClasses,
    fit_latent_classes,
    fit_transition,
    given_posterior,
    log_odds_of,
    rows_at_a_time,
)
from lightning_unlearn.functional.mixture import GaussianMixture, Reduce, fit_mixture, standardise
from lightning_unlearn.types import Evidence

ENTRY_POINTS = "lightning_unlearn.recipes"
"""Group in which other packages offer recipes."""

# Standard errors by which the components' means must differ before one is called clean.
_DECISIVE = 3.0
_LONE = 1.5

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
_MEMORISED = 0.9
# Gate: disagreement of the most confident quarter, over the mean uncertainty that noise-free data would leave.
_UNEXPLAINED = 1.5
# A shorter view is taken instead if it finds so many times as much unexplained, and more than so much; less will do
# where other parts of training were memorised outright, if it is not much less sure.
_CLEARER = 1.25
_STRIKING = 3.0
_LESS_SURE_BY = 1.5

# A class is not known to the model if it predicts it of less than this share of the samples that are called so.
_SELDOM = 0.05

_NOT_NAMED = "some class is called by another's name more often than by its own, so nothing can be told"
_NOT_KNOWN = "the model tells fewer than two classes, or than half of them, from the others, so nothing can be told"

# Input evidence. Gate: the share of samples between the two groups, and how much less sure the model is of one of them,
# in standard deviations.
_BETWEEN = 0.01
_LESS_SURE = 0.5

# What a gate that is closed leaves of the doubt: nothing is suspect, and the order stays.
_NO_DOUBT = 0.01


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a recipe says of one rank's share.

    Args:
        clean_probability: (n,) float32.
        suggested_label: (n,) int64, for a sample that turns out not to be clean.
        suggested_probability: (n,) float32, probability that the suggested label is right and the input intact; None
            where the recipe does not say, which counts as all that p(clean) leaves.
        label_probability: (n,) float32, probability that the given label is right; None if it was not asked.
        input_probability: (n,) float32, probability that the input is intact; None if it was not asked.
        noise_matrix: (C, C) float32, row k the estimated probabilities of what a sample of class k is called; None if
            it was not estimated, as with more than 2,048 classes. The same on every rank.
        notes: what the gates said, for the log. The same on every rank.
        warning: why the verdict should not be acted upon; empty if it can be. The same on every rank.
        unusable: (n,) bool, samples that must not be trained on in any case; None where there are none.
    """

    clean_probability: Tensor
    suggested_label: Tensor
    suggested_probability: Tensor | None = None
    label_probability: Tensor | None = None
    input_probability: Tensor | None = None
    noise_matrix: Tensor | None = None
    notes: tuple[str, ...] = ()
    warning: str = ""
    unusable: Tensor | None = None


Judge = Callable[[Evidence, Reduce], Verdict]


@dataclass(frozen=True)
class Recipe:
    """A way to a partition.

    Args:
        name: for configuration and messages.
        judge: from this rank's evidence, and the function that sums over ranks, to a verdict.
        needs_rows: whether it needs the per-neuron attributions ``Evidence.rows``.
        needs_response: whether it looks at ``Evidence.response``, an early layer's response to the input.
        averages: whether evidence of earlier epochs counts.
        soft: whether neurons are regressed on the probability (else, as in the paper, on the two clusters).
    """

    name: str
    judge: Judge
    needs_rows: bool = False
    needs_response: bool = False
    averages: bool = True
    soft: bool = True


def _higher_component(score: Tensor, share: Tensor, weight: Tensor, reduce: Reduce) -> int | None:
    """The component with the higher mean score, or None if the means are too close to tell, or one is a lone sample's.

    Args:
        score: (n,), higher is cleaner.
        share: (n, 2), probability of each component.
        weight: (n,).
        reduce: sums over the ranks.
    """
    s, w = score.double().unsqueeze(1), share * weight.double().unsqueeze(1)
    count, first, second = reduce(torch.stack([w.sum(0), (w * s).sum(0), (w * s * s).sum(0)]))
    # A sample that is far from all others, by an overflow say, draws a component to itself.
    if (count < _LONE).any():
        return None
    mean = first / count
    standard_error = ((second / count - mean**2).clamp(min=0) / count).sum().sqrt()
    gap = (mean[1] - mean[0]).item()
    if not math.isfinite(gap) or abs(gap) <= _DECISIVE * standard_error.item():
        return None
    return int(gap > 0)


def _undecided(evidence: Evidence, what: str) -> Verdict:
    return Verdict(
        torch.ones_like(evidence.weight),
        evidence.label,
        warning=(
            f"the two groups found do not differ in {what}, or one of them is a single sample, so which of them is"
            " clean cannot be told"
        ),
    )


def _calls_all_the_same(evidence: Evidence, reduce: Reduce) -> Verdict | None:
    """A verdict that is not to be acted upon where the last pass predicts one class of all samples, else None.

    Of a dead network, or one that has fallen back on the largest class, a score says what a sample is called, not more.
    """
    zeros = evidence.weight.new_zeros(evidence.num_classes).double()
    counts = reduce(zeros.index_add(0, evidence.prediction, evidence.weight.double()))
    if int((counts > 0).sum()) > 1:
        return None
    return Verdict(
        torch.ones_like(evidence.weight),
        evidence.label,
        warning="the model predicts the same class of all samples, so nothing can be told",
    )


def _rival(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The class other than the given one that the model was most for on the whole, and its share among the others.

    Returns:
        (n,) int64 and (n,) float32 in [0, 1].
    """
    scores = evidence.attribution.mean(dim=1) @ evidence.basis.T
    share, rival = scores.scatter(1, evidence.label.unsqueeze(1), -torch.inf).softmax(dim=1).max(dim=1)
    return rival, share


@dataclass(frozen=True, eq=False)
class _View:
    """A part of what a sample's class attributions were, early and late and in the end.

    Args:
        blocks: (n, P', r), at most three: two of training, one of the last pass.
        of_training: how many of them are averages over training.
        is_part: whether the rest was left out because it was memorised.
    """

    blocks: Tensor
    of_training: int
    is_part: bool = False


def _views(evidence: Evidence, reduce: Reduce) -> list[_View]:
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
    *informs, last_informs = (agrees[1:] <= _MEMORISED * agrees[0]).tolist()
    last = blocks[:, -1:]
    if not informs:
        return [_View(last, 1)]
    views, is_part = [], not (last_informs and all(informs))
    for phases in range(len(informs), 0, -1):
        if phases > 1 and not informs[phases - 1]:
            continue
        halves = [part.mean(dim=1) for part in blocks[:, :phases].tensor_split(2, dim=1) if part.shape[1]]
        of_training = torch.stack(halves, dim=1)
        if last_informs:
            views.append(_View(torch.cat([of_training, last], dim=1), len(halves), is_part))
        views.append(_View(of_training, len(halves), is_part))
    return views


@dataclass(frozen=True, eq=False)
class _LabelModel:
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


def _label_model(evidence: Evidence, reduce: Reduce) -> _LabelModel:
    """The latent classes of the view that shows wrong labels most clearly.

    That is not the one of most samples suspected, but the one in which the most confident samples disagree with their
    labels for the least reason. What was half memorised in the end speaks for wrong labels as if they were right; what
    was hardly learned yet is unsure of everything. Of several views of clean data some will look suspicious by chance,
    so a shorter view must be far clearer than a longer one.
    """
    views = _views(evidence, reduce)
    longest = best = _fit_view(views[0], evidence, reduce)
    for view in views[1:]:
        model = _fit_view(view, evidence, reduce)
        striking = model.unexplained > _STRIKING
        sure = model.uncertainty <= _LESS_SURE_BY * longest.uncertainty
        if model.unexplained > _CLEARER * best.unexplained and (striking or (view.is_part and sure)):
            best = model
    return best


def _fit_view(view: _View, evidence: Evidence, reduce: Reduce) -> _LabelModel:
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
    length = rows_at_a_time(evidence.num_classes)
    for first in range(0, len(y), length):
        part = slice(first, first + length)
        label, likelihood = y[part].unsqueeze(1), likelihood_of(part)
        wrong = 1 - given_posterior(_TEMPER * likelihood, y[part], transition).gather(1, label).squeeze(1).exp()
        unsure = 1 - likelihood.softmax(dim=1).amax(dim=1)
        sums += torch.stack([torch.ones_like(wrong), wrong, unsure]) @ w[part]
        score = _WEIGHT * likelihood + _LOGITS * blocks[part, -2:].mean(dim=1).double() @ basis.T
        posterior = given_posterior(score, y[part], transition)
        predicted = score.argmax(dim=1)
        share, suggested = posterior.scatter(1, label, -torch.inf).softmax(dim=1).max(dim=1)
        columns.append((log_odds_of(posterior, y[part]), predicted, log_odds_of(score, predicted), suggested, share))
    number, total_wrong, total_unsure = reduce(sums).tolist()
    log_odds, predicted, confidence, suggested, suggested_share = map(torch.cat, zip(*columns, strict=True))
    disagreement = confident_disagreement(
        confidence, predicted == y, predicted, evidence.weight, evidence.num_classes, reduce=reduce
    )
    return _LabelModel(
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


def judge_label(evidence: Evidence, reduce: Reduce) -> Verdict:
    """The posterior that the given label is right, from true classes behind the given ones.

    A latent-class model (:mod:`~lightning_unlearn.functional.latent`) on the class attributions of the first and the
    second half of training, as far as it was not memorised, and of the last pass gives every sample a likelihood under
    each true class, and how classes are called. The likelihoods, weakened, are added to the model's own logits; the
    probability of the given label under both, and under the transition matrix, is set to the noise rate that the latent
    classes alone estimate.

    The gate: without noise, a classifier is wrong on the average sample as often as it expects to be, and on its most
    confident quarter far less. If the most confident quarter of every class disagrees with the labels more than 1.5
    times as often as the *average* sample is expected to, uncertainty does not explain it, and there are wrong labels;
    else nothing is suspect. Nor is anything where a class is called by another's name more often than by its own: which
    of the two it is cannot be told then, and a network that has hardly learned yet looks like that. Nor is anything
    where the model predicts hardly more than one class, or fewer than half of them.
    """
    model, w = _label_model(evidence, reduce), evidence.weight
    rate = min(max(model.rate, 1e-6), 1 - 1e-6)
    probability = (model.log_odds + shift_to_rate(model.log_odds, w, rate, reduce=reduce)).sigmoid().float()
    matrix = model.transition.float() if model.transition.ndim == 2 else None
    found = model.unexplained > _UNEXPLAINED
    if not found:
        probability = 1 - _NO_DOUBT * (1 - probability)
        matrix = None if matrix is None else torch.eye(len(matrix), device=matrix.device)
    note = (
        f"labels: {model.disagreement:.1%} of the most confident samples disagree, {model.uncertainty:.1%} expected of"
        f" the average one: {model.objection or ('wrong labels' if found else 'no sign of wrong labels')}"
    )
    return Verdict(
        probability,
        model.suggested,
        (1 - probability) * model.suggested_share.float(),
        label_probability=probability,
        noise_matrix=matrix,
        notes=(note,),
        warning=model.objection,
    )


def judge_input(evidence: Evidence, reduce: Reduce) -> Verdict:
    """The probability that the input is intact, from an early layer's response to it.

    A mixture on the response. The gate: fewer than one per cent of the samples lie between the two groups, and the
    model was less sure of one of them in the course of training; that one is the corrupted one. Two kinds of intact
    inputs, such as recordings of two microphones, differ too, but run into each other.
    """
    intact = torch.ones_like(evidence.weight)
    if evidence.response is None:
        return Verdict(intact, evidence.label, notes=("inputs: no early layer to look at",))
    w, u = evidence.weight.double(), evidence.uncertainty.double()
    rows = standardise(evidence.response.double(), evidence.weight, reduce)
    mixture = fit_mixture(rows, evidence.weight, reduce=reduce)
    share = mixture.posterior(rows)
    between = ((share[:, 0] > 0.1) & (share[:, 0] < 0.9)).double()
    sums = reduce(torch.cat([torch.stack([w, w * between, w * u, w * u * u]).sum(dim=1), w @ share, (w * u) @ share]))
    number, ambiguous = sums[0], (sums[1] / sums[0]).item()
    deviation = (sums[3] / number - (sums[2] / number) ** 2).clamp(min=1e-12).sqrt()
    group = sums[4:6]
    means = sums[6:8] / group.clamp(min=1e-9)
    gap = ((means[1] - means[0]) / deviation).item()
    clean = 0 if gap > 0 else 1
    found = bool((group > 1).all()) and ambiguous <= _BETWEEN and abs(gap) >= _LESS_SURE
    probability = share[:, clean].float()
    note = (
        f"inputs: two groups, the smaller of {group.min() / number:.1%}, {ambiguous:.1%} of the samples between them,"
        f" the model less sure of one by {abs(gap):.2f} standard deviations:"
        f" {'corrupted inputs' if found else 'no sign of corrupted inputs'}"
    )
    if not found:
        probability = intact
    return Verdict(probability, evidence.label, input_probability=probability, notes=(note,))


def judge_auto(evidence: Evidence, reduce: Reduce) -> Verdict:
    """Both kinds of evidence, each behind its gate: p(clean) is the product.

    The latent classes are fitted on the samples whose input is intact.
    """
    inputs = judge_input(evidence, reduce)
    intact = inputs.clean_probability
    kept = replace(evidence, weight=evidence.weight * (intact >= 0.5))
    labels = judge_label(kept, reduce)
    suggested = labels.suggested_probability
    corrupted = reduce((evidence.weight * (intact < 0.5)).double().sum()).item() > 0
    return Verdict(
        labels.clean_probability * intact,
        labels.suggested_label,
        None if suggested is None else suggested * intact,
        label_probability=labels.label_probability,
        input_probability=inputs.input_probability,
        noise_matrix=labels.noise_matrix,
        notes=labels.notes + inputs.notes,
        warning="" if corrupted else labels.warning,
    )


def judge_rlap(evidence: Evidence, reduce: Reduce) -> Verdict:
    """The paper's steps 2-3 on ``Evidence.rows``, without its noise mask.

    The reference code takes from the true noise mask which of the two clusters is the clean one. Here it is the one
    whose given labels the model fits better: the lower mean cross-entropy.
    """
    if evidence.rows is None:
        raise ValueError(
            "The recipe 'rlap' needs Evidence.rows, the per-neuron attributions (n, D), but they are None."
        )
    rows = standardise(evidence.rows, evidence.weight, reduce)
    share = fit_mixture(rows, evidence.weight, reduce=reduce).posterior(rows)
    clean = _higher_component(-evidence.loss, share, evidence.weight, reduce)
    if clean is None:
        return _undecided(evidence, "the model's loss on them")
    probability = share[:, clean].float()
    # The paper's clusters speak of the sample and not of its label: the model's word is all there is.
    return Verdict(probability, evidence.prediction, (1 - probability) * _confidence(evidence))


def _judge_score(score: Tensor, evidence: Evidence, reduce: Reduce) -> Verdict:
    """A mixture on one number per sample, the component with the higher mean being clean."""
    if blind := _calls_all_the_same(evidence, reduce):
        return blind
    rows = standardise(score.double().unsqueeze(1), evidence.weight, reduce)
    mixture: GaussianMixture = fit_mixture(rows, evidence.weight, reduce=reduce)
    mean = mixture.mean.squeeze(1)
    count = reduce(mixture.posterior(rows).double().T @ evidence.weight.double())
    if mean[0] == mean[1] or bool((count < _LONE).any()):
        return _undecided(evidence, "the score")
    probability = mixture.posterior_monotone(rows, int(mean[1] > mean[0])).float()
    rival, share = _rival(evidence)
    return Verdict(probability, rival, (1 - probability) * share, label_probability=probability)


def _confidence(evidence: Evidence) -> Tensor:
    """(n,) in [0, 1], the model's probability of its own prediction in the last pass."""
    return (evidence.attribution[:, -1] @ evidence.basis.T).softmax(dim=1).amax(dim=1)


def judge_loss(evidence: Evidence, reduce: Reduce) -> Verdict:
    """Baseline: a mixture on the last pass's loss (Arazo et al. 2019, DivideMix), the lower being clean."""
    return _judge_score(-evidence.loss, evidence, reduce)


def judge_aum(evidence: Evidence, reduce: Reduce) -> Verdict:
    """Baseline: a mixture on the margin averaged over training (AUM, Pleiss et al. 2020), the higher being clean."""
    return _judge_score(evidence.mean_margin, evidence, reduce)


def judge_argmax(evidence: Evidence, reduce: Reduce) -> Verdict:
    """Baseline: a sample is clean if the model predicts its label; the probability is that against the rival alone."""
    if blind := _calls_all_the_same(evidence, reduce):
        return blind
    probability = evidence.margin.sigmoid().float()
    return Verdict(
        probability, evidence.prediction, (1 - probability) * _confidence(evidence), label_probability=probability
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("auto", judge_auto, needs_response=True),
        Recipe("label", judge_label),
        Recipe("input", judge_input, needs_response=True),
        Recipe("rlap", judge_rlap, needs_rows=True, averages=False, soft=False),
        Recipe("loss", judge_loss, averages=False),
        Recipe("aum", judge_aum),
        Recipe("argmax", judge_argmax, averages=False),
    )
}


def get_recipe(recipe: str | Recipe | Callable[..., Any]) -> Recipe:
    """The recipe of a name, of a dotted path, or of a function.

    Args:
        recipe: a name of :data:`RECIPES`; a name in the entry-point group ``lightning_unlearn.recipes``; the dotted
            path of a function or a :class:`Recipe`; or one of these. A function takes
            :class:`~lightning_unlearn.types.Evidence`, and, if it has a second parameter without a default, the
            function that sums over ranks; it returns p(clean), (n,), or a :class:`Verdict`.

    Raises:
        ValueError: if there is none; the message lists those there are.
        TypeError: if it is neither a name nor a function.

    Example:
        >>> get_recipe("auto").needs_rows
        False
        >>> get_recipe(lambda evidence: evidence.support).name
        '<lambda>'
    """
    if isinstance(recipe, Recipe):
        return recipe
    if callable(recipe):
        return Recipe(getattr(recipe, "__name__", type(recipe).__name__), _as_judge(recipe), needs_response=True)
    if not isinstance(recipe, str):
        raise TypeError(
            f"Expected recipe to be a name, a dotted path or a function, but got a {type(recipe).__name__}."
        )
    if recipe in RECIPES:
        return RECIPES[recipe]
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if recipe in offered:
        return replace(get_recipe(offered[recipe].load()), name=recipe)
    if "." in recipe and all(part.isidentifier() for part in recipe.split(".")):
        return replace(get_recipe(_import(recipe)), name=recipe)
    names = [*RECIPES, *offered]
    near = difflib.get_close_matches(recipe, names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(
        f"Expected recipe to be one of {', '.join(map(repr, names))}, or the dotted path of a function, but got"
        f" '{recipe}'.{hint}"
    )


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Expected recipe to be the dotted path of a function that can be imported, but '{path}' cannot: {error}."
        ) from error
    if not callable(found) and not isinstance(found, Recipe):
        raise ValueError(f"Expected recipe '{path}' to be a function, but it is a {type(found).__name__}.")
    return found


def _as_judge(function: Callable[..., Any]) -> Judge:
    """A user's function as a judge, its answer checked."""
    # A second parameter with a default is a setting of the user's own.
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    takes_reduce = len(parameters) > 1 and parameters[1].default is inspect.Parameter.empty
    name = getattr(function, "__name__", type(function).__name__)

    def judge(evidence: Evidence, reduce: Reduce) -> Verdict:
        answer: Any = function(evidence, reduce) if takes_reduce else function(evidence)
        verdict = answer if isinstance(answer, Verdict) else Verdict(answer, _rival(evidence)[0])
        probability: Any = verdict.clean_probability
        shape = evidence.index.shape
        if not isinstance(probability, Tensor) or probability.shape != shape:
            found = tuple(probability.shape) if isinstance(probability, Tensor) else type(probability).__name__
            raise ValueError(f"Expected recipe '{name}' to return p(clean) of shape {tuple(shape)}, but got {found}.")
        illegal = ~((probability >= 0) & (probability <= 1)).all()
        # Together, as the others would wait for a rank that has given up.
        if reduce(illegal.double()).item() > 0:
            here = (
                f"they span {probability.min():.4g} to {probability.max():.4g}" if illegal else "another rank's do not"
            )
            raise ValueError(f"Expected recipe '{name}' to return probabilities in [0, 1], but {here}.")
        return replace(verdict, clean_probability=probability.float())

    return judge
