"""Label evidence gathered over training, a few numbers per sample.

Evidence is averaged over training because the last model has memorised part of the noise: what survives memorisation is
how the margin was while the network was still generalising (the idea of AUM, Pleiss et al. 2020, arXiv 2001.10528).
"""

from __future__ import annotations

from torch import Tensor


def label_support(margin: Tensor) -> Tensor:
    """How strongly the given label is supported against the strongest other, between 0 and 1.

    The logistic function of the margin: the probability of the given label if only these two were possible. Margins are
    averaged over training in this form, because they grow as a network memorises, without bound; as they are, the last
    passes, which know least, would outweigh the early ones.

    Args:
        margin: (B,), margin attribution summed over the neurons, in nats.

    Returns:
        (B,)

    Example:
        >>> import torch
        >>> label_support(torch.tensor([0.0, 100.0]))
        tensor([0.5000, 1.0000])
    """
    return margin.sigmoid()


def support_log_odds(support: Tensor) -> Tensor:
    """The averaged support on the scale of the margin, where its two groups are closer to Gaussian.

    The inverse of :func:`label_support`: after one pass it is the margin attribution itself.

    Args:
        support: (n,) in [0, 1].

    Returns:
        (n,) in nats, limited to those of a support of one in a million from either end.

    Example:
        >>> import torch
        >>> support_log_odds(label_support(torch.tensor([-2.0, 0.0, 3.0]))).round(decimals=3)
        tensor([-2.,  0.,  3.])
    """
    return support.logit(eps=1e-6)


def update_majority(candidate: Tensor, votes: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the Boyer-Moore majority vote, for every sample at once.

    Finds the class that was chosen in more than half of the passes, if there is one, in two integers per sample instead
    of a count per class.

    Args:
        candidate: (N,) int64, the standing candidates.
        votes: (N,) int64, the votes that the candidates have in hand; 0 at the start.
        choice: (N,) int64, the classes chosen in this pass.

    Returns:
        the new ``candidate`` and ``votes``.

    Example:
        >>> import torch
        >>> candidate, votes = torch.tensor([0]), torch.tensor([0])
        >>> for choice in (4, 2, 4):
        ...     candidate, votes = update_majority(candidate, votes, torch.tensor([choice]))
        >>> candidate, votes
        (tensor([4]), tensor([1]))
    """
    candidate = choice.where(votes == 0, candidate)
    return candidate, votes + (candidate == choice).long() * 2 - 1
