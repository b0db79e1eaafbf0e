"""The samples of the validation loader, and checks that they can be judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_unlearn.data.fingerprint import fingerprint, varies
from lightning_unlearn.data.loaders import batch_size, check_iterates_in_order, check_loader, iterate_indices
from lightning_unlearn.data.sampling_scheme import scheme_of
from lightning_unlearn.trainer.compat import MisconfigurationException
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.rank_checks import check_ranks
from lightning_unlearn.trainer.row_checks import establish_rows
from lightning_unlearn.trainer.row_counts import check_number

_WANTED = "Expected validation data that can be judged (judge_validation=True), but"


@dataclass(frozen=True, eq=False)
class ValidationSamples:
    """The validation set.

    Args:
        loader: that the fit validates with.
        left_out: dataset indices that it never draws.
        fingerprint: of its data set.
    """

    loader: DataLoader[Any]
    left_out: frozenset[int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]  # its length has been checked


def find_samples(fit: FitContext) -> ValidationSamples:
    """Return the samples of the fit's validation loader, or raise if they cannot be judged."""
    with fit.isolated_eval(keep=False):
        loaders = [loader for loader, _ in fit.validation_loaders()]
        if len(loaders) != 1:
            raise MisconfigurationException(
                f"Expected one validation loader for judge_validation=True, but the fit has {len(loaders)}; return one"
                " from val_dataloader (torch's ConcatDataset joins data sets), or leave judge_validation out."
            )
        with _named():
            loader = check_loader(loaders[0], "validation")
            left_out = _left_out(fit, loader)
    with fit.isolated_eval(), torch.no_grad(), _named():
        check_iterates_in_order(loader)
        _try_batch(fit, loader)
        rows = establish_rows(fit, loader, may_offer=False)
        found = fingerprint(loader)
    samples = ValidationSamples(loader, left_out, found)
    check_ranks(fit, len(samples), found, rows, of="validation")
    return samples


@contextmanager
def _named() -> Iterator[None]:
    """Name the validation data in errors raised inside the context."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # Not as of its own class, which may be made of something else than a text.
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{_WANTED}: {error}") from error
    except Exception as error:  # of whatever kind, from the user's data or forward
        raise ValueError(
            f"{_WANTED}: {type(error).__name__}: {error}; return batches in the format of the training"
            " batches, or leave judge_validation out."
        ) from error


def _left_out(fit: FitContext, loader: DataLoader[Any]) -> frozenset[int]:
    """Return which samples of its data set a loader never draws."""
    drawn_from = getattr(loader.batch_sampler, "sampler", None)
    sampler, _ = fit.users_sampler(loader, drawn_from, loader.sampler)
    scheme = scheme_of(sampler)
    if scheme is None:
        raise TypeError(
            "the validation samples cannot be identified, as its loader uses a"
            f" {type(loader.batch_sampler if sampler is None else sampler).__name__}; use one of torch's samplers"
        )
    drawn = set(scheme.index[scheme.weight > 0].tolist())
    return frozenset(range(len(loader.dataset))) - drawn  # type: ignore[arg-type]  # its length has been checked


def _try_batch(fit: FitContext, loader: DataLoader[Any]) -> None:
    """Check that the first batch is read, and passes through the model, as one of training does."""
    task_format, size = fit.task_format, min(batch_size(loader), len(loader.dataset))  # type: ignore[arg-type]
    indices, batch = next(iterate_indices(loader, torch.arange(size), probing=True, absent=set()))
    x, label = task_format.split(fit.to_device(batch))
    check_number(loader, label, len(indices), may_offer=False)
    labels, logits = task_format.labels(label, len(indices)), fit.logits(x)
    if tuple(logits.shape) != (len(labels), task_format.num_classes):
        raise ValueError(
            f"forward returns logits {tuple(logits.shape)} for {len(labels)} labels of"
            f" {task_format.num_classes} classes"
        )


def check_not_trained_on(fit: FitContext, samples: ValidationSamples, trained_on: str) -> None:
    """Refuse validation samples that are trained on.

    Args:
        fit: that begins.
        samples: of the validation loader.
        trained_on: fingerprint of the training set.

    Raises:
        ValueError: saying what to do.
    """
    loader = fit.train_loader
    is_known = samples.fingerprint == trained_on and not varies(trained_on)
    if not is_known and samples.loader.dataset is not loader.dataset:
        return
    sampler, _ = fit.users_sampler(loader, getattr(loader.batch_sampler, "sampler", None), loader.sampler)
    scheme = scheme_of(sampler)
    drawn = set(range(len(samples)) if scheme is None else scheme.index[scheme.weight > 0].tolist())
    if both := len(drawn - samples.left_out):
        raise ValueError(
            f"{_WANTED} {both:,} of its {len(samples) - len(samples.left_out):,} samples are also in the"
            " training set, so the network has learned their labels; use other samples, or leave"
            " judge_validation out."
        )
