"""Spoken words as wav files, a share of them called wrongly: find and hear them, and repair what they taught.

Measured on 712 synthetic words, 40 % called wrongly: validation accuracy 1.000 after 21 epochs, .596 without the
callbacks; 285 suspects, 281 of them truly wrong (of 285 that are). 94 s of CPU, both fits.
One seed, one thread of a busy 2-core x86-64 machine, torch 2.11.0,
lightning 2.6.6, captum 0.9.0, 2026-12-01.

Run: python speech.py [--data DIR] [--noise SHARE] [--fast]
"""

import argparse
import math
import wave
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchaudio.functional import resample
from torchaudio.transforms import MelSpectrogram
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, UnlearnReport
from lightning_unlearn.noise import symmetric_labels

QUIET: dict = {"devices": 1, "logger": False, "enable_checkpointing": False}

RATE = 8000

# The first three resonances of the vowels' mouths, in Hz. A synthetic "word" glides from one vowel to another.
VOWELS = {"a": (750, 1200, 2500), "i": (300, 2250, 3000), "o": (450, 850, 2400)}
WORDS = [first + second for first in VOWELS for second in VOWELS if first != second]


def synthesise(word: str, generator: torch.Generator) -> Tensor:
    """Harmonics of a falling pitch, louder near the resonances, with a voice, a pace and a noise of their own."""
    pitch, pace, size, turn, loudness = torch.rand(5, generator=generator).tolist()
    progress = torch.linspace(0, 1, int(RATE * (0.3 + 0.5 * pace)))
    f0 = (100 + 140 * pitch) * (1.1 - 0.2 * progress)
    start, end = (torch.tensor(VOWELS[vowel]).view(3, 1, 1) * (0.85 + 0.3 * size) for vowel in word)
    resonance = start + (end - start) * torch.sigmoid(12 * (progress - 0.35 - 0.3 * turn))
    harmonic = torch.arange(1, 33).view(-1, 1)
    gain = (1 / (1 + ((harmonic * f0 - resonance) / 90) ** 2)).sum(0) / harmonic * (harmonic * f0 < RATE / 2)
    voice = (gain * (2 * math.pi * harmonic * (f0 / RATE).cumsum(0)).sin()).sum(0) * (math.pi * progress).sin()
    return (0.1 + 0.6 * loudness) * voice / voice.abs().max() + 0.02 * torch.randn(voice.shape, generator=generator)


def make_wav_files(root: Path, per_word: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for word in WORDS:
        (root / word).mkdir(parents=True)
        for number in range(per_word):
            write_wav(root / word / f"{number:03}.wav", synthesise(word, generator))


def write_wav(file: Path, sound: Tensor) -> None:
    with wave.open(str(file), "wb") as opened:
        opened.setparams((1, 2, RATE, 0, "NONE", ""))
        opened.writeframes((sound.clamp(-1, 1) * 32767).short().numpy().astype("<i2").tobytes())


def read_wav(file: Path) -> tuple[Tensor, int]:
    """Of 16 bits. From version 2.9 on, torchaudio.load reads more, and needs torchcodec and FFmpeg for it."""
    with wave.open(str(file)) as opened:
        if opened.getsampwidth() != 2:
            raise ValueError(f"Expected wav files of 16 bits, but {file} has {8 * opened.getsampwidth()}.")
        frames = np.frombuffer(opened.readframes(opened.getnframes()), "<i2").reshape(-1, opened.getnchannels())
        return torch.from_numpy(frames.mean(1, dtype=np.float32) / 32768), opened.getframerate()


class WavFiles(Dataset):
    """A second of sound (1, T), and the label."""

    def __init__(self, files: list[Path], label: Tensor) -> None:
        self.files = files
        self.label = label

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sound, rate = read_wav(self.files[index])
        sound = resample(sound, rate, RATE)[:RATE]
        return nn.functional.pad(sound, (0, RATE - len(sound))).unsqueeze(0), int(self.label[index])


class Words(L.LightningDataModule):
    """``data/WORD/*.wav`` as in Speech Commands, or ``data/WORD_SPEAKER_NUMBER.wav`` as in the Free Spoken Digits."""

    def __init__(
        self, data: str = "data/speech", noise: float = 0.4, per_word: int = 150, batch_size: int = 64
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        if not Path(self.hparams.data).exists():
            make_wav_files(Path(self.hparams.data), self.hparams.per_word)

    def setup(self, stage: str) -> None:
        root = Path(self.hparams.data)
        files = sorted(root.rglob("*.wav"))
        word_of = {file: file.parent.name if file.parent != root else file.stem.split("_")[0] for file in files}
        self.classes = sorted(set(word_of.values()))
        # A file stays in its part, whatever becomes of the others.
        held_out = {file for file in files if zlib.crc32(str(file.relative_to(root)).encode()) % 5 == 0}
        train, val = [file for file in files if file not in held_out], sorted(held_out)
        true, val_label = (torch.tensor([self.classes.index(word_of[file]) for file in part]) for part in (train, val))
        given = symmetric_labels(true, self.hparams.noise, len(self.classes), seed=0)
        self.is_wrong = given != true  # to tell how well it went; no callback sees it
        self.train_data, self.val_data = WavFiles(train, given), WavFiles(val, val_label)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_data, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_data, self.hparams.batch_size)


class Classifier(L.LightningModule):
    def __init__(self, classes: int = len(WORDS), lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.mel = MelSpectrogram(RATE, n_fft=256, hop_length=128, n_mels=40)
        blocks = []
        for before, after in ((1, 24), (24, 48), (48, 96)):
            blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(96 * 5 * 7, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, sound: Tensor) -> Tensor:
        return self.head(self.features((self.mel(sound) + 1e-3).log()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", multiclass_accuracy(self(x), y, self.hparams.classes, average="micro"), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


def train_without(data: L.LightningDataModule, make_model: Callable[[], L.LightningModule], epochs: int) -> float:
    """Validation accuracy of the same fit without the callbacks."""
    L.seed_everything(0, verbose=False)
    model = make_model()
    trainer = L.Trainer(
        **QUIET, max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0
    )
    trainer.fit(model, datamodule=data)
    return trainer.validate(model, datamodule=data, verbose=False)[0]["val_acc"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", help="with WORD/*.wav or WORD_SPEAKER_NUMBER.wav; else synthetic")
    parser.add_argument("--noise", type=float, help="share of training labels to make wrong (0 with --data)")
    parser.add_argument("--out", default="runs/speech", metavar="DIR", help="for what was found (%(default)s)")
    parser.add_argument("--fast", action="store_true", help="few sounds and epochs, to see it run")
    options = parser.parse_args()
    epochs, per_word, batch_size = (8, 25, 16) if options.fast else (21, 150, 64)

    made = "data/speech-fast" if options.fast else "data/speech"
    noise = options.noise if options.noise is not None else 0.0 if options.data else 0.4
    data = Words(options.data or made, noise, per_word, batch_size)
    data.prepare_data()
    data.setup("fit")

    # What a team has: a model, data, a Trainer. What is new: the callbacks.
    partition = AttributionPartitionCallback()
    finetune = CleanSubsetFinetuneCallback()
    report = UnlearnReport(options.out, class_names=data.classes, sample_rate=RATE)

    make_model = partial(Classifier, len(data.classes))
    L.seed_everything(0, verbose=False)
    model = make_model()
    trainer = L.Trainer(**QUIET, max_epochs=epochs, callbacks=[partition, finetune, report])
    trainer.fit(model, datamodule=data)
    with_them = trainer.validate(model, datamodule=data, verbose=False)[0]["val_acc"]

    found = partition.partition
    found.to_csv(Path(options.out, "suspects.csv"), class_names=data.classes, columns={"file": data.train_data.files})

    without = train_without(data, make_model, epochs)
    print(
        f"\nValidation accuracy after {epochs} epochs: {without:.3f} without the callbacks, {with_them:.3f} with them."
    )
    suspects = found.suspect_indices().tolist()
    print(f"{len(suspects)} of {len(found)} sounds are suspect, the most suspect of them:")
    for at in suspects[:5]:
        given, suggested = data.classes[found.label[at]], data.classes[found.suggested_label[at]]
        print(f"  {data.train_data.files[at]}: {given}, rather {suggested}")
    # Known only because the wrong ones were made here.
    if data.is_wrong.any():
        right = int(data.is_wrong[suspects].sum())
        print(f"{right} of these {len(suspects)} are truly wrong, of {int(data.is_wrong.sum())} that are.")
    print(f"All of them: {options.out}/suspects.csv. To look at: {options.out}/report.html")


if __name__ == "__main__":
    main()
