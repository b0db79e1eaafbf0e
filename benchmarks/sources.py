"""The data of the benchmarks, as tensors in [0, 1] before normalization.

Each source takes the path of a file that the user names; nothing is downloaded and nothing is copied into the project.
"""

from __future__ import annotations

import io
import wave
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_unlearn.demo import DigitsDataModule

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Source:
    """A data set.

    Args:
        train: (N, channels, height, width) float32 in [0, 1].
        true_label: (N,) int64.
        human_label: (N,) int64, what people called the samples, or None.
        test: like ``train``.
        test_label: (M,) int64.
    """

    train: Tensor
    true_label: Tensor
    human_label: Tensor | None
    test: Tensor
    test_label: Tensor


class Rows(Dataset[Any]):
    """Tensors that are fetched a batch at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices)
        return in_layout(self.x[rows]), self.y[rows]


def in_layout(x: Tensor) -> Tensor:
    """A batch as the networks take it: images with the channels last."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The collate function of :class:`Rows`."""
    return batch


def cifar(path: Path, train_size: int, test_size: int, seed: int) -> Source:
    """A random part of CIFAR-10 with the human labels "worse" of CIFAR-10N."""
    from torchvision.io import decode_jpeg

    file = np.load(path)

    def images(part: str, chosen: np.ndarray) -> Tensor:
        blob, offsets = file[f"{part}_jpeg"], file[f"{part}_offsets"]
        raw = [torch.from_numpy(blob[offsets[i] : offsets[i + 1]].copy()) for i in chosen]
        return torch.stack([decode_jpeg(item) for item in raw]).float() / 255

    draw = np.random.default_rng(seed)
    train = np.sort(draw.permutation(len(file["train_label"]))[:train_size])
    test = np.sort(draw.permutation(len(file["test_label"]))[:test_size])
    return Source(
        train=images("train", train),
        true_label=torch.from_numpy(file["train_label"][train].astype(np.int64)),
        human_label=torch.from_numpy(file["train_human_label"][train].astype(np.int64)),
        test=images("test", test),
        test_label=torch.from_numpy(file["test_label"][test].astype(np.int64)),
    )


def spoken_digits(path: Path) -> Source:
    """The Free Spoken Digit Dataset as log-mel spectrograms, 40 bands x 63 frames; takes 0-4 are for testing."""
    import torchaudio

    mel = torchaudio.transforms.MelSpectrogram(sample_rate=8000, n_fft=256, hop_length=128, n_mels=40)
    rows: dict[bool, list[tuple[Tensor, int]]] = {True: [], False: []}
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".wav"))
        for name in names:
            digit, _, take = Path(name).stem.split("_")
            with wave.open(io.BytesIO(archive.read(name))) as sound:
                samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2").astype(np.float32) / 32768
            # 62 hops: one second, which few recordings exceed; shorter ones are padded with silence.
            clip = torch.zeros(62 * 128)
            clip[: len(samples)] = torch.from_numpy(samples.copy())[: len(clip)]
            rows[int(take) < 5].append((mel(clip).add(1e-6).log(), int(digit)))
    train, test = (torch.stack([image for image, _ in rows[part]]).unsqueeze(1) for part in (False, True))
    low, high = train.min(), train.max()
    return Source(
        train=(train - low) / (high - low),
        true_label=torch.tensor([digit for _, digit in rows[False]]),
        human_label=None,
        test=((test - low) / (high - low)).clamp(0, 1),
        test_label=torch.tensor([digit for _, digit in rows[True]]),
    )


def digits(seed: int) -> Source:
    """Scikit-learn's handwritten digits, 1 x 8 x 8; a random third is for testing, the demo's."""
    module = DigitsDataModule(noise=0.0, seed=seed)
    module.setup()
    train, label = module.train_data.tensors
    # What the demo validates on is tested on too.
    test, test_label = map(torch.cat, zip(module.val_data.tensors, module.test_data.tensors, strict=True))
    return Source(train, label, None, test, test_label)
