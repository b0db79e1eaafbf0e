"""True classes behind given labels: a Gaussian mixture over classes, seen through a noisy labeller.

A sample has a true class k, drawn from the prior. Its evidence x, what the model said of each class in the course of
training, is Gaussian around the mean of class k, whatever the sample is called. The label that it was given is drawn
from row k of the transition matrix. Expectation maximisation fits all of it from ``(x, given label)`` alone: no mask,
no clean set, no noise rate.

It sees what no margin sees. Where two in five of every class c are called c + 1, a network that has learned this gives
every sample of class c both c and c + 1; whether the label is right then does not show in how far it leads, but in
*which* pair of classes stands out, and that is what the means of the classes hold. Lee et al. (2019, "Robust inference
via generative classifiers") put Gaussian classes on a trained network's features; here the rows are the class
attributions over training, and the transition matrix is fitted with them.

Every step reduces sums that ranks can add: counts (C, C), first moments (C, d), and second moments (C, d, d), or (d, d)
where there are many classes. Of very many, a transition matrix would have more entries than there are samples to tell
them: there it has one number a class, how often it goes by its own name, and all other names are alike. Nothing is held
per sample beside the rows, labels and weights that are given: 4 d + 16 bytes a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_unlearn.functional.mixture import Reduce, no_reduce, reduce_together, weighted_mean

ROWS = 8_192
"""Rows that are held in double precision at a time, at most."""

MOST_NUMBERS = 2**23
"""Numbers, one for each class of a row, that are held at a time."""

MOST_IN_CACHE = 2**18
"""The same on a processor, where what is gone over again and again should stay in its cache: 2 MiB."""

LEAST_ROWS = 128
"""Rows that are worked on together even so, as a product with fewer would read all classes for each few of them."""

MOST_NAMES = 2_048
"""Classes up to which there is a number for every name that each may go by."""

OWN_COVARIANCE = 0.2
"""How far the covariance of a large class is its own; the rest is the one that all classes share."""

MOST_MOMENTS = 2**20
"""Numbers of the classes' own second moments, above which there is only the shared one."""

MOST_HELD = 2**24
"""Likelihoods, one for each class of a row, that are held in double precision: 128 MiB."""

MOST_HELD_SINGLE = 2**26
"""The same in single precision, where they are too many for double: 256 MiB."""

_FEW_CLASSES = 64
_RIDGE = 1e-3
# Share of the total variance below which the variance within classes is rounding.
_ROUNDING = 1e-9
_STEPS = 5


@dataclass(frozen=True, eq=False)
class LatentClasses:
    """Gaussian classes and how they are called.

    Args:
        prior: (C,) float64, share of each true class.
        mean: (C, d) float64, of the rows.
        factor: (C, d, d) float64, or (1, d, d) for all of them: lower Cholesky factor of the covariance.
        transition: (C, C) float64, row k the probabilities of what a sample of class k is called; or (C,), the
            probabilities of its own name, the others being alike.
    """

    prior: Tensor
    mean: Tensor
    factor: Tensor
    transition: Tensor

    def log_likelihood(self, rows: Tensor) -> Tensor:
        """Log of prior x density of each true class, whatever the label.

        Args:
            rows: (n, d).

        Returns:
            (n, C) float64.
        """
        out = rows.new_empty(len(rows), len(self.prior), dtype=torch.float64)
        length = rows_at_a_time(self._numbers, rows.device)
        for chunk, into in zip(torch.split(rows, length), torch.split(out, length), strict=True):
            into.copy_(self._of_chunk(chunk.double()))
        return out

    def _of_chunk(self, x: Tensor) -> Tensor:
        if len(self.factor) == 1:
            # In one product: half the squared distance is that of the two to the origin less their scalar product.
            whitened = _whiten(x, self.factor[0])
            means, constant = self._whitened
            log_density = torch.addmm(constant, whitened, means.T)
            return log_density.sub_(0.5 * whitened.square().sum(1, keepdim=True))
        # All classes in one product, with a row for each class and coordinate, along which sums are fast.
        matrix, offset = self._whitening
        squares = torch.addmm(offset, matrix, x.T).square_().reshape(*self.mean.shape, len(x)).sum(dim=1)
        return squares.mul_(-0.5).T.add_(self._constant)

    @property
    def _numbers(self) -> int:
        """How many are worked on for a row."""
        return len(self.prior) if len(self.factor) == 1 else own_numbers(*self.mean.shape)

    @cached_property
    def _whitening(self) -> tuple[Tensor, Tensor]:
        """(C d, d) and (C d, 1): where the covariance of each class is one, and less its mean."""
        inverse = torch.linalg.solve_triangular(self.factor, torch.eye(self.mean.shape[1]).to(self.factor), upper=False)
        return inverse.flatten(0, 1), -(inverse @ self.mean.unsqueeze(2)).flatten(0, 1)

    @cached_property
    def _constant(self) -> Tensor:
        """(C,), what does not depend on the row."""
        half_log_det = self.factor.diagonal(dim1=1, dim2=2).log().sum(1)
        return self.prior.clamp(min=1e-300).log() - half_log_det - 0.5 * self.mean.shape[1] * math.log(2 * math.pi)

    @cached_property
    def _whitened(self) -> tuple[Tensor, Tensor]:
        """The means (C, d) where the covariance is one, and the constant less half of their squared length."""
        means = _whiten(self.mean, self.factor[0])
        return means, self._constant - 0.5 * means.square().sum(1)


def _whiten(x: Tensor, factor: Tensor) -> Tensor:
    whitened: Tensor = torch.linalg.solve_triangular(factor, x.T, upper=False).T
    return whitened


def rows_at_a_time(numbers: int, device: torch.device) -> int:
    """How many rows of so many numbers, one for each class or more, are worked on together."""
    most = min(ROWS, MOST_NUMBERS // numbers)
    if device.type == "cpu":
        most = min(most, max(LEAST_ROWS, MOST_IN_CACHE // numbers))
    return max(1, most)


def own_numbers(num_classes: int, dimension: int) -> int:
    """How many numbers there are for a row where classes have their own covariance: its whitened self, and squares."""
    return 2 * num_classes * dimension


def softmax(logits: Tensor) -> Tensor:
    """The softmax of (n, C) over the classes; ``logits`` are written to.

    Of few classes torch's own takes several times as long on a processor.
    """
    if logits.shape[1] > _FEW_CLASSES:
        return logits.softmax(dim=1)
    logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
    return logits.div_(logits.sum(dim=1, keepdim=True))


@dataclass(frozen=True, eq=False)
class LogNames:
    """How classes are called, as logarithms, which take as long as a good many rows.

    Args:
        transition: (C, C) or (C,), see :class:`LatentClasses`.
    """

    transition: Tensor

    @cached_property
    def _of_name(self) -> Tensor:
        """(C, C), row y the log-probabilities of that name under each true class."""
        return self.transition.clamp(min=1e-300).log().T.contiguous()

    @cached_property
    def _other_and_own(self) -> tuple[Tensor, Tensor]:
        """(C,) each: of any other name, and how much more of its own."""
        others = (1 - self.transition) / max(len(self.transition) - 1, 1)
        own, other = (x.clamp(min=1e-300).log() for x in (self.transition, others))
        return other, own - other

    def joint(self, log_likelihood: Tensor, label: Tensor) -> Tensor:
        """(n, C), log-probability of the evidence and the name of each sample under each true class."""
        if self.transition.ndim == 2:
            return self._of_name[label].add_(log_likelihood.double())
        other, more = self._other_and_own
        joint = log_likelihood.double() + other
        joint[torch.arange(len(label), device=label.device), label] += more[label]
        return joint


def given_posterior(log_likelihood: Tensor, label: Tensor, transition: Tensor | LogNames) -> Tensor:
    """Log-probability of each true class, given the evidence and what the sample is called.

    Args:
        log_likelihood: (n, C), see :meth:`LatentClasses.log_likelihood`.
        label: (n,) int64.
        transition: (C, C) or (C,), see :class:`LatentClasses`; for who asks of many parts, its logarithms.

    Returns:
        (n, C) float64, log-probabilities.
    """
    names = transition if isinstance(transition, LogNames) else LogNames(transition)
    return names.joint(log_likelihood, label).log_softmax(dim=1)


def log_odds_of(log_probability: Tensor, label: Tensor) -> Tensor:
    """Log-odds of one class against all the others.

    Args:
        log_probability: (n, C) log-probabilities, or anything that differs from them by a constant per row.
        label: (n,) int64.

    Returns:
        (n,)

    Example:
        >>> log_odds_of(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([0]))
        tensor([0.])
    """
    column = label.unsqueeze(1)
    own = log_probability.gather(1, column).squeeze(1)
    return own - log_probability.scatter(1, column, -torch.inf).logsumexp(dim=1)


def _row_chunks(numbers: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    length = rows_at_a_time(numbers, tensors[0].device)
    return zip(*(torch.split(tensor, length) for tensor in tensors), strict=True)


def _no_counts(like: Tensor, num_classes: int) -> Tensor:
    """Of true class and given name, (C, C); with very many classes of true class, and of those by its own name (C, 2).

    The names come first, as whole rows are added.
    """
    names = num_classes if num_classes <= MOST_NAMES else 2
    return like.new_zeros(names, num_classes, dtype=torch.float64)


def _is_square(counts: Tensor) -> bool:
    return counts.shape[0] == counts.shape[1]


def _count(counts: Tensor, share: Tensor, label: Tensor) -> None:
    """Adds shares (n, C) of the true classes of samples of these names."""
    if _is_square(counts):
        counts.index_add_(0, label, share)
    else:
        counts[0] += share.sum(dim=0)
        counts[1].index_add_(0, label, share.gather(1, label.unsqueeze(1)).squeeze(1))


def _smoothed(counts: Tensor) -> Tensor:
    """Counts as probabilities; one sample more of each class, spread over the names, so that nothing is impossible."""
    each = 1 / counts.shape[1]
    if not _is_square(counts):
        return (counts[1] + each) / (counts[0] + 1)
    counts = counts.T + each
    return counts / counts.sum(dim=1, keepdim=True)


def fit_transition(
    log_likelihood: Tensor | Callable[[slice], Tensor],
    label: Tensor,
    weight: Tensor,
    start: Tensor,
    *,
    reduce: Reduce = no_reduce,
    steps: int = 10,
) -> Tensor:
    """The transition matrix that explains the given labels best, the classes' likelihoods being known.

    Args:
        log_likelihood: (n, C) of the true classes; or a function from some rows to theirs, so that not all are held.
        label: (n,) int64.
        weight: (n,), 0 for a row that does not count.
        start: (C, C) or (C,) to start from, see :class:`LatentClasses`.
        reduce: sums over the ranks.
        steps: of expectation maximisation.

    Returns:
        float64 of the shape of ``start``.
    """
    transition = start
    likelihood = _relative_likelihoods(log_likelihood, label, len(start))
    for _ in range(steps):
        counts = start.new_zeros(len(start) if start.ndim == 2 else 2, len(start))
        names, add = transition.clamp(min=1e-300), _add_own_names
        if start.ndim == 2:
            names, add = names.T.contiguous(), _add_names
        for rows, part in likelihood():
            add(counts, part, label[rows], weight[rows].double(), names)
        transition = _smoothed(reduce(counts))
    return transition


def _relative_likelihoods(
    log_likelihood: Tensor | Callable[[slice], Tensor], label: Tensor, num_classes: int
) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
    """Parts of the rows and their likelihoods over that of the likeliest class, again and again.

    They do not change from step to step, so that a step without logarithms takes a product of each. Held if not too
    many.
    """
    length = rows_at_a_time(num_classes, label.device)
    parts = [slice(first, first + length) for first in range(0, len(label), length)]

    def made(rows: slice) -> Tensor:
        ll = (log_likelihood[rows] if isinstance(log_likelihood, Tensor) else log_likelihood(rows)).double()
        return (ll - ll.amax(dim=1, keepdim=True)).exp_()

    numbers = len(label) * num_classes
    if numbers > MOST_HELD_SINGLE:
        return lambda: ((rows, made(rows)) for rows in parts)
    dtype = torch.float64 if numbers <= MOST_HELD else torch.float32
    held = [made(rows).to(dtype) for rows in parts]
    return lambda: ((rows, part.double()) for rows, part in zip(parts, held, strict=True))


def _add_names(counts: Tensor, likelihood: Tensor, label: Tensor, weight: Tensor, names: Tensor) -> None:
    """Adds the shares of the true classes of samples to their names (C, C); ``names`` has a row for each."""
    share = names[label].mul_(likelihood)
    share.mul_((weight / share.sum(dim=1)).unsqueeze(1))
    counts.index_add_(0, label, share)


def _add_own_names(counts: Tensor, likelihood: Tensor, label: Tensor, weight: Tensor, names: Tensor) -> None:
    """Adds them to the true classes and to those by their own name (2, C); ``names`` has that one's probability."""
    other = ((1 - names) / max(len(names) - 1, 1)).clamp(min=1e-300)
    own = likelihood.gather(1, label.unsqueeze(1)).squeeze(1)
    by_name = own * names[label]
    more = by_name - own * other[label]
    each = weight / (likelihood @ other + more)
    counts[0] += (each @ likelihood) * other
    counts[0].index_add_(0, label, each * more)
    counts[1].index_add_(0, label, each * by_name)


def fit_latent_classes(
    rows: Tensor,
    label: Tensor,
    weight: Tensor,
    start: Callable[[Tensor], Tensor],
    num_classes: int,
    *,
    reduce: Reduce = no_reduce,
) -> LatentClasses:
    """Fits the classes by expectation maximisation.

    Args:
        rows: (n, d), this rank's rows; finite.
        label: (n,) int64, the given labels.
        weight: (n,), 0 for a row that does not count.
        start: from rows (m, d) to a first guess (m, C) of the probabilities of the true classes.
        num_classes: C.
        reduce: sums over the ranks.

    Returns:
        the classes, the same on every rank.

    Raises:
        ValueError: on rows that are not finite, on every rank alike.

    Example:
        >>> rows = torch.tensor([[-1.0], [-1.2], [-0.8], [1.0], [1.2], [0.8]])
        >>> label = torch.tensor([0, 0, 1, 1, 1, 1])  # the third is wrong
        >>> sides = lambda x: torch.stack([x[:, 0] < 0, x[:, 0] > 0], dim=1).double()
        >>> fit_latent_classes(rows, label, torch.ones(6), sides, 2).transition.round(decimals=1)
        tensor([[0.6000, 0.4000],
                [0.1000, 0.9000]], dtype=torch.float64)
    """
    dimension = rows.shape[1]
    own = num_classes * dimension**2 <= MOST_MOMENTS
    # From the mean on, since the difference of two large sums would lose the covariance.
    centre, _ = weighted_mean(rows, weight, reduce)
    if not centre.isfinite().all():  # as NaN and infinity leave no sum finite, on any rank
        raise ValueError(
            "The latent classes need finite evidence, but some rows hold NaN or infinity: has training diverged?"
        )

    def first_guess(x: Tensor, y: Tensor) -> Tensor:
        return start(x + centre).to(torch.float64, copy=True)  # as it is weighted in place

    classes = _maximise(_moments(rows, centre, (label, weight), first_guess, num_classes, own), reduce)
    for _ in range(_STEPS - 1):
        names = LogNames(classes.transition)

        def expected(x: Tensor, y: Tensor, current: LatentClasses = classes, names: LogNames = names) -> Tensor:
            return softmax(names.joint(current._of_chunk(x), y))

        classes = _maximise(_moments(rows, centre, (label, weight), expected, num_classes, own), reduce)
    return LatentClasses(classes.prior, classes.mean + centre, classes.factor, classes.transition)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Counts of names and true classes, first (C, d) and second (C or 1, d, d) moments."""

    counts: Tensor
    first: Tensor
    second: Tensor


def _moments(
    rows: Tensor,
    centre: Tensor,
    label_and_weight: tuple[Tensor, Tensor],
    share_of: Callable[[Tensor, Tensor], Tensor],
    num_classes: int,
    own: bool,
) -> _Moments:
    """Sums over this rank's rows, seen from ``centre``; ``share_of`` maps such rows and labels to (m, C)."""
    dimension = rows.shape[1]
    zeros = rows.new_zeros
    numbers = own_numbers(num_classes, dimension) if own else num_classes
    counts = _no_counts(rows, num_classes)
    first = zeros(num_classes, dimension, dtype=torch.float64)
    second = zeros(num_classes if own else 1, dimension, dimension, dtype=torch.float64)
    for chunk, y, w in _row_chunks(numbers, rows, *label_and_weight):
        x = chunk.double() - centre
        share = share_of(x, y).mul_(w.double().unsqueeze(1))
        _count(counts, share, y)
        first += share.T @ x
        # With a row for each class and coordinate, so that one product serves all classes.
        by, columns = (share.T if own else w.double().unsqueeze(0)).contiguous(), x.T.contiguous()
        second.flatten(0, 1).addmm_((by.unsqueeze(1) * columns).flatten(0, 1), columns.T)
    return _Moments(counts, first, second)


def _maximise(part: _Moments, reduce: Reduce) -> LatentClasses:
    counts, first, second = reduce_together(reduce, part.counts, part.first, part.second)
    number = counts.sum(dim=0) if _is_square(counts) else counts[0]
    # A class without samples keeps the overall mean and covariance: nothing is drawn to it, nothing divides by zero.
    present = number > 1e-6
    mean = torch.where(present.unsqueeze(1), first / number.clamp(min=1e-6).unsqueeze(1), 0)
    dimension, samples = first.shape[1], number.sum()
    between = torch.einsum("k,kd,ke->de", number, mean, mean)
    shared = (second.sum(dim=0) - between) / samples
    # What classes that do not vary leave is the rounding of two large sums, which may be less than nothing.
    rounding = _ROUNDING * second.sum(dim=0).diagonal().abs().sum() / samples / dimension
    shared.diagonal().add_((_RIDGE * shared.trace() / dimension).clamp(min=rounding.clamp(min=1e-12)))
    covariance = shared.unsqueeze(0)
    if len(second) == len(number):
        within = second / number.clamp(min=1e-6).reshape(-1, 1, 1) - mean.unsqueeze(2) * mean.unsqueeze(1)
        trust = (OWN_COVARIANCE * number / (number + dimension)).reshape(-1, 1, 1)
        covariance = torch.where(present.reshape(-1, 1, 1), trust * within + (1 - trust) * shared, shared)
    return LatentClasses(number / samples, mean, torch.linalg.cholesky(covariance), _smoothed(counts))
