"""Corrupted inputs: Gaussian noise, as everywhere and as in the paper, and noise under a sound."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_unlearn.utilities.checks import check_number, check_numbers, check_seed, shown


class GaussianInputs(Dataset[Any]):
    """A dataset of ``(x, y)`` with Gaussian noise on some of its inputs, the same in every epoch.

    Args:
        dataset: map-style, of items ``(x, y)`` with a float tensor x, before normalization.
        sigma: standard deviation of the noise, in units of x.
        share: share of the items that are corrupted, to the nearest item.
        seed: of the choice and of the noise.
        limits: between which *every* input is clamped, corrupted or not; None for no limits.

    Attributes:
        is_corrupted: (N,) bool. For evaluation only.

    Raises:
        TypeError: when an item is fetched whose x is not a float tensor.
        ValueError: for a sigma that is negative or not finite, a share not in [0, 1], or limits in the wrong order.

    Example:
        >>> noisy = GaussianInputs([(torch.zeros(3), 0)] * 4, sigma=1.0, share=0.5, seed=0)
        >>> noisy.is_corrupted.sum(), bool((noisy[0][0] == noisy[0][0]).all())
        (tensor(2), True)
    """

    def __init__(
        self,
        dataset: Any,
        *,
        sigma: float,
        share: float,
        seed: int,
        limits: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        share = check_number("share", share, least=0, most=1)
        self.dataset = dataset
        self.sigma = check_number("sigma", sigma, least=0)
        self.seed = check_seed("seed", seed)
        self.limits = None if limits is None else _checked_limits(limits)
        self.is_corrupted = _chosen(len(cast(Sized, dataset)), share, self.seed)

    def __len__(self) -> int:
        return len(self.is_corrupted)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        index = range(len(self))[index]  # so that item -1 is the last one, with its noise
        x, *rest = self.dataset[index]
        _check_float(x, index)
        corrupted = bool(self.is_corrupted[index])
        if corrupted:
            x = x + self.sigma * torch.randn(x.shape, generator=_stream(self.seed, index), dtype=x.dtype)
        return (self._limited(x, corrupted), *rest)

    def _limited(self, x: Tensor, corrupted: bool) -> Tensor:
        return x if self.limits is None else x.clamp(*self.limits)


class PaperImageNoise(GaussianInputs):
    """The image noise of the paper's experiments, as its code adds it: it gives itself away.

    ``clamp(x + 4.5 * randn, 0, 1)`` on *normalized* pixels, where the images without noise are not clamped (RLAP, arXiv
    2506.11615): ``x.min() >= 0`` tells the two apart without a model. For reproduction; take :class:`GaussianInputs`
    before normalization to judge anything. Unlike the paper's code, an image has the same noise in every epoch.

    Args:
        dataset: map-style, of items ``(x, y)`` with a float tensor x, *after* normalization.
        sigma: standard deviation of the noise; the paper has 4.5 and 8 for CIFAR-10, 5 for MNIST.
        share: share of the items that are corrupted, to the nearest item.
        seed: of the choice and of the noise.

    Attributes:
        is_corrupted: (N,) bool. For evaluation only.

    Example:
        >>> noisy = PaperImageNoise([(torch.tensor([-1.0, 1.0, 2.0]), 0)] * 4, seed=0)
        >>> [bool(x.min() >= 0) for x, _ in noisy] == noisy.is_corrupted.tolist()
        True
    """

    def __init__(self, dataset: Any, *, sigma: float = 4.5, share: float = 0.5, seed: int) -> None:
        super().__init__(dataset, sigma=sigma, share=share, seed=seed)

    def _limited(self, x: Tensor, corrupted: bool) -> Tensor:
        return super()._limited(x, corrupted) if corrupted else x


class PaperMfccNoise(GaussianInputs):
    """The noise of the paper's speech experiments: ``x + 15 * randn`` on MFCCs, without limits (arXiv 2506.11615).

    Args:
        dataset: map-style, of items ``(x, y)`` with a float tensor x of MFCCs.
        sigma: standard deviation of the noise.
        share: share of the items that are corrupted, to the nearest item.
        seed: of the choice and of the noise.

    Attributes:
        is_corrupted: (N,) bool. For evaluation only.

    Example:
        >>> x, y = PaperMfccNoise([(torch.zeros(40, 101), 0)], share=1.0, seed=0)[0]
        >>> round(x.std().item())
        15
    """

    def __init__(self, dataset: Any, *, sigma: float = 15.0, share: float = 0.5, seed: int) -> None:
        super().__init__(dataset, sigma=sigma, share=share, seed=seed, limits=None)


class NoiseAtSnr(Dataset[Any]):
    """A dataset of ``(waveform, ...)`` with noise under some of its sounds, the same in every epoch.

    Powers are means over all of a clip, the silence that pads it included. A silent clip stays silent, also where
    ``is_corrupted`` names it. Needs torchaudio (``pip install torchaudio``).

    Args:
        dataset: map-style, of items ``(waveform, *rest)`` with a float waveform (..., T), as torchaudio has.
        snr_db: power of the sound over that of the noise, in decibels; 0 makes both as loud, 20 is faint.
        share: share of the items that are corrupted, to the nearest item.
        seed: of the choice and of the noise.
        background: (T',) float, a recording of which a random stretch is mixed in that does not begin with silence,
            repeated where it is too short; white noise by default.

    Attributes:
        is_corrupted: (N,) bool. For evaluation only.

    Raises:
        ImportError: without torchaudio.
        TypeError: when an item is fetched whose waveform is not a float tensor.
        ValueError: for a share not in [0, 1], a ratio that is not a number, or a background that is silent or not one
            channel.

    Example:
        >>> noisy = NoiseAtSnr([(torch.ones(1, 8000), 16000, "yes")], snr_db=0.0, share=1.0, seed=0)
        >>> waveform, sample_rate, label = noisy[0]
        >>> round((waveform - 1).square().mean().item(), 3)
        1.0
    """

    def __init__(
        self, dataset: Any, *, snr_db: float, share: float, seed: int, background: Tensor | None = None
    ) -> None:
        snr_db, share = check_number("snr_db", snr_db), check_number("share", share, least=0, most=1)
        seed = check_seed("seed", seed)
        if background is not None and (background.ndim != 1 or not len(background)):
            raise ValueError(
                "Expected background to be one channel of samples (T',), but got shape"
                f" {tuple(background.shape)}; take one with background[0]."
            )
        if background is not None and not (background.isfinite().all() and background.any()):
            raise ValueError("Expected background to be heard, but it is silent, or has samples that are not finite.")
        self._add_noise = _add_noise()
        self.dataset = dataset
        self.snr_db = snr_db
        self.seed = seed
        self.background = background
        # A stretch of silence has no power to be brought to the ratio.
        self._starts = None if background is None else background.nonzero().flatten()
        self.is_corrupted = _chosen(len(cast(Sized, dataset)), share, seed)

    def __len__(self) -> int:
        return len(self.is_corrupted)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        index = range(len(self))[index]
        waveform, *rest = self.dataset[index]
        _check_float(waveform, index)
        if self.is_corrupted[index]:
            snr = torch.full(waveform.shape[:-1], self.snr_db, dtype=waveform.dtype)
            waveform = self._add_noise(waveform, self._noise(waveform, index), snr)
        return (waveform, *rest)

    def _noise(self, waveform: Tensor, index: int) -> Tensor:
        stream = _stream(self.seed, index)
        if self.background is None or self._starts is None:
            return torch.randn(waveform.shape, generator=stream, dtype=waveform.dtype)
        start = self._starts[torch.randint(len(self._starts), (1,), generator=stream)]
        places = (start + torch.arange(waveform.shape[-1])) % len(self.background)
        return self.background[places].to(waveform.dtype).expand_as(waveform)


def _checked_limits(limits: Any) -> tuple[float, float]:
    found = check_numbers("limits", limits)
    if len(found) != 2 or not found[0] < found[1]:
        raise ValueError(f"Expected limits (lowest, highest), but got {shown(limits)}.")
    return found[0], found[1]


def _add_noise() -> Any:
    try:
        from torchaudio.functional import add_noise
    except ImportError as error:
        raise ImportError("NoiseAtSnr needs torchaudio: pip install torchaudio.") from error
    return add_noise


def _check_float(x: Any, index: int) -> None:
    if isinstance(x, Tensor) and x.is_floating_point():
        return
    kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    raise TypeError(
        f"Expected item {index} to start with a float tensor, but got {kind}; make one in the dataset's transform, such"
        " as torchvision's ToTensor()."
    )


def _chosen(total: int, share: float, seed: int) -> Tensor:
    """Return (N,) bool, the share of the items that is corrupted, to the nearest item."""
    # Not the bare seed: with it a random_split, or wrong labels, would choose the same items.
    order = torch.randperm(total, generator=_stream(seed, -2))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[: round(share * total)]] = True
    return chosen


def _stream(seed: int, index: int) -> torch.Generator:
    """Return randomness of an item's own, so that neither the order nor the worker matters."""
    return torch.Generator().manual_seed((int(seed) * 1_000_003 + index + 1) % 2**63)
