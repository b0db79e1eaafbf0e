"""The result of a fit: p(clean) of every training sample.

Letters used throughout the package: ``N`` training samples, ``n`` samples of one rank's shard, ``B`` samples of a
batch, ``D`` neurons of a layer, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_unlearn.results.class_summary import ClassSummary, summary_of_classes, summary_of_labels
from lightning_unlearn.results.labels import (
    DECISIONS,
    LISTS,
    REASONS,
    any_label,
)
from lightning_unlearn.results.review_csv import check_undecided
from lightning_unlearn.results.status import PartitionStatus, checked_status
from lightning_unlearn.results.storage import faults_of, load_record, save_record
from lightning_unlearn.results.table import columns_of
from lightning_unlearn.results.validate import check_partition
from lightning_unlearn.utilities.checks import check_flag, check_names, check_number, check_whole, shown
from lightning_unlearn.utilities.files import write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATE_VERSION = 7

_NONE = torch.zeros(0, 0)
_NOBODY = torch.zeros(0, dtype=torch.bool)

# Minimum expected share of wrong samples in a list that is worth a look.
_WORTH = 0.5


@dataclass(frozen=True, eq=False)
class Partition:
    """The probability of being clean of every training sample, by dataset index.

    An index is a position in ``loader.dataset``, including samples that the loader's sampler leaves out. With a Subset
    it is a position in the Subset; with a ConcatDataset, a position in the concatenation.

    Args:
        clean_probability: (N,) float32, probability in [0, 1] that the sample is clean. If ``noise_rate`` is None, only
            the order of the values is meaningful.
        is_clean: (N,) bool, False for suspects. If ``noise_rate_interval`` is known, suspects are the longest list with
            the callback's ``suspect_precision``, otherwise the samples with ``clean_probability`` below one half. The
            most probable samples of a class count as clean if too few would be left.
        suggested_label: (N,) int64, or (N, L) in multi-label tasks; the given label if the sample is clean and not
            worth a look (see :meth:`worth_review`).
        suggested_probability: (N,) float32, probability in [0, 1] that ``suggested_label`` is correct.
        noise_rate: estimated share of samples that are not clean, in [0, 1]; this can exceed the share of suspects.
            None if unknown: the result is inconclusive, or no noise was detected, which does not exclude noise that
            cannot be detected.
        label: (N,) int64, the given labels; -1 for an ignored label, whose sample is not judged. In multi-label tasks
            (N, L), 1 for each label that the sample has, otherwise 0.
        label_evidence: (N,) float32 in [0, 1], sigmoid of the margin of the given label, averaged over the passes; in
            multi-label tasks the minimum over the labels.
        input_evidence: (N,) float32 in [0, 1], probability that the input is intact; 1 if not estimated.
        reason: (N,) uint8, why a sample is not clean: a position in :data:`~lightning_unlearn.results.labels.REASONS`;
            0 for a clean sample.
        noise_matrix: (C, C) float32, estimated noise transition matrix: row k holds the probabilities of each label for
            true class k. (0, 0) if not estimated.
        recipe: name of the recipe.
        layer: layer at which attributions were computed.
        epoch: number of complete epochs.
        warning: why the partition should not be acted on; empty if it can be.
        fingerprint: fingerprint of the training set, from its size and some of its samples; empty if unknown.
        label_probability: (N, L) float32 in multi-label tasks, the probability that each label (or its absence) is
            correct, with ``clean_probability`` as its minimum; otherwise (0, 0).
        relabel_threshold: minimum probability of a suggested label that is used for re-labeling.
        noise_rate_interval: 95 % interval ``(low, high)``; ``high`` is 1.0 if only a lower bound is known. None if not
            estimated, so that ``clean_probability`` is not calibrated.
        often_called: ``(class, label, share)`` of pairs where the class is often labeled as another, most frequent
            first.
        class_names: names of the classes, by label; empty if unknown.
        status: whether the partition can be acted on; defaults to ``"inconclusive"`` if there is a warning.
        doubtful: (N,) bool, samples that are not suspect, but that fine-tuning excludes because their label is wrong
            with a probability above .3; none by default.
        keys: N integers or strings in ascending order if samples are identified by a key
            (``DataFormat(sample_key=...)``); an index is then a position in ``keys``. Empty otherwise.
        files: N paths of the samples' files, by index, if the dataset lists them; otherwise empty. Checkpoints do not
            store them.

    Example:
        >>> import torch
        >>> partition = Partition(
        ...     clean_probability=torch.tensor([0.9, 0.2]),
        ...     is_clean=torch.tensor([True, False]),
        ...     suggested_label=torch.tensor([3, 1]),
        ...     suggested_probability=torch.tensor([0.9, 0.7]),
        ...     noise_rate=0.45,
        ...     label=torch.tensor([3, 7]),
        ...     label_evidence=torch.tensor([0.9, 0.1]),
        ...     input_evidence=torch.ones(2),
        ...     reason=torch.tensor([0, 1], dtype=torch.uint8),
        ...     noise_matrix=torch.zeros(0, 0),
        ...     recipe="label",
        ...     layer="input of 'fc'",
        ...     epoch=5,
        ... )
        >>> partition.clean_indices(), partition.suspect_indices()
        (tensor([0]), tensor([1]))
    """

    clean_probability: Tensor
    is_clean: Tensor
    suggested_label: Tensor
    suggested_probability: Tensor
    noise_rate: float | None
    label: Tensor
    label_evidence: Tensor
    input_evidence: Tensor
    reason: Tensor
    noise_matrix: Tensor
    recipe: str
    layer: str
    epoch: int
    warning: str = ""
    fingerprint: str = ""
    label_probability: Tensor = _NONE
    relabel_threshold: float = 0.7
    noise_rate_interval: tuple[float, float] | None = None
    often_called: tuple[tuple[int, int, float], ...] = ()
    status: PartitionStatus = PartitionStatus.OK
    class_names: tuple[str, ...] = ()
    doubtful: Tensor = _NOBODY
    keys: tuple[int, ...] | tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    # The index of each key, created on first use.
    _places: ClassVar[Mapping[Any, int]] = {}

    def __post_init__(self) -> None:
        _put(self, status=checked_status(self.status, self.warning), class_names=_names_of(self.class_names))
        check_partition(self)

    def __len__(self) -> int:
        return len(self.clean_probability)

    def __repr__(self) -> str:
        # Tensors of the size of the dataset would not be readable.
        suspects = len(self) - int(self.is_clean.sum())
        warned = f", warning={self.warning!r}" if self.warning else ""
        rate = "" if self.noise_rate is None else f", noise_rate={self.noise_rate:.3f}"
        return (
            f"Partition({len(self):,} samples, {suspects:,} suspect{rate}, status={self.status.value!r},"
            f" recipe={self.recipe!r}, layer={self.layer!r}, epoch={self.epoch}{warned})"
        )

    def indices_of(self, keys: Sequence[int] | Sequence[str]) -> Tensor:
        """Return (n,) int64, the index of each sample by its key; -1 for an unknown key.

        Args:
            keys: n keys.
        """
        if len(self._places) != len(self.keys):
            object.__setattr__(self, "_places", {key: at for at, key in enumerate(self.keys)})
        return torch.tensor([self._places.get(key, -1) for key in keys], dtype=torch.int64)

    @property
    def is_multilabel(self) -> bool:
        """Whether a sample may have several labels."""
        return self.label_probability.numel() > 0

    @property
    def is_actionable(self) -> bool:
        """Whether there are clean and suspect samples, and the status allows acting on them."""
        return self.status is PartitionStatus.OK and 0 < int(self.is_clean.sum()) < len(self)

    def clean_indices(self) -> Tensor:
        """Return dataset indices of the clean samples, ascending, int64."""
        return self.is_clean.nonzero().flatten()

    def trained_on(self) -> Tensor:
        """Return (N,) bool, the samples that are clean and not doubtful, which fine-tuning trains on as labeled."""
        return self.is_clean & ~self.doubtful

    def suspect_indices(self) -> Tensor:
        """Return dataset indices of the suspects, most suspect first, int64.

        Samples of equal probability are ordered by ``label_evidence``, lowest first.
        """
        return self._by_doubt(~self.is_clean)

    def review_ranking(self) -> Tensor:
        """Return dataset indices of all samples that are not suspect, most likely wrong first, int64.

        This list is for review: nothing acts on it without a decision. :meth:`worth_review` returns how many of them
        are worth a look.
        """
        return self._by_doubt(self.is_clean)

    def _by_doubt(self, of: Tensor) -> Tensor:
        """Return the indices of the samples in ``of``, (N,) bool, most likely wrong first."""
        members = of.nonzero().flatten()
        by_evidence = members[self.label_evidence[members].argsort(stable=True)]
        return by_evidence[self.clean_probability[by_evidence].argsort(stable=True)]

    def ranking(self) -> Tensor:
        """Return dataset indices of all samples, int64: the suspects, then :meth:`review_ranking`."""
        return torch.cat([self.suspect_indices(), self.review_ranking()])

    def expected_precision_at(self, depth: int) -> float | None:
        """Return the expected share of wrong samples among the first ``depth`` of :meth:`ranking`.

        None if the noise rate is unknown or has no interval, since ``clean_probability`` is then not calibrated.

        Raises:
            ValueError: for a depth that is not in [1, N].
        """
        depth = check_whole("depth", depth, least=1, most=len(self), meaning="the number of samples")
        curve = self.precision_curve()
        return None if curve is None else float(curve[depth - 1])

    def precision_curve(self) -> Tensor | None:
        """Return (N,) float64, :meth:`expected_precision_at` for every depth from 1 to N; None if unknown."""
        if not self._counts:
            return None
        wrong = 1 - self.clean_probability[self.ranking()].double()
        return wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)

    @property
    def _counts(self) -> bool:
        """Whether p(clean) is calibrated."""
        return self.noise_rate is not None and self.noise_rate_interval is not None

    @property
    def expected_precision(self) -> float | None:
        """Expected share of wrong samples among the suspects; None without suspects, or if not estimated."""
        suspects = len(self) - int(self.is_clean.sum())
        return self.expected_precision_at(suspects) if suspects else None

    def worth_review(self) -> int:
        """Return the length of the longest start of :meth:`review_ranking` of which half are expected to be wrong.

        0 if the noise rate is unknown or has no interval.
        """
        if not self._counts:
            return 0
        wrong = 1 - self.clean_probability[self.review_ranking()].double()
        return int((wrong.cumsum(0) >= _WORTH * torch.arange(1, len(wrong) + 1)).sum())

    def listed(self) -> list[str]:
        """Return the list of each sample: ``"suspect"``, ``"review"`` (worth a look) or ``"clean"``."""
        word = [LISTS[int(one)] for one in self.is_clean.tolist()]
        for index in self.review_ranking()[: self.worth_review()].tolist():
            word[index] = LISTS[2]
        return word

    def reasons(self) -> list[str]:
        """Return why each sample is not clean, in words: ``"none"``, ``"label"``, ``"input"`` or ``"both"``."""
        return [REASONS[code] for code in self.reason.tolist()]

    def relabel_mask(self, threshold: float | None = None) -> Tensor:
        """Return (N,) bool, the suspects with a wrong label and a probable enough suggested label.

        Samples with a corrupted input are not re-labeled.

        Args:
            threshold: minimum probability of the suggested label, in (0, 1]; by default ``relabel_threshold``.

        Raises:
            ValueError: for a threshold out of range.
        """
        least = self.relabel_threshold
        if threshold is not None:
            least = check_number("threshold", threshold, above=0, most=1)
        # A recipe that suggests what the network predicts suggests the given label again where that was memorized.
        differs = any_label(self.suggested_label != self.label)
        wrong = ~self.is_clean & (self.reason == REASONS.index("label"))
        return wrong & (self.suggested_probability >= least) & differs

    def decisions(self, threshold: float | None = None) -> list[str]:
        """Return the default treatment of each sample: ``"keep"``, ``"drop"`` or ``"relabel"``.

        ``"relabel"`` applies to ``CleanSubsetFinetuneCallback(on_noisy="relabel")``; otherwise such samples are
        dropped.

        Args:
            threshold: minimum probability of the suggested label, in (0, 1]; by default ``relabel_threshold``.

        Raises:
            ValueError: for a threshold out of range.
        """
        code = torch.where(self.trained_on(), 0, torch.where(self.relabel_mask(threshold), 2, 1))
        return [DECISIONS[one] for one in code.tolist()]

    def class_summary(self) -> list[ClassSummary]:
        """Return a summary of each given label, the one with the largest share of suspects first."""
        return summary_of_labels(self) if self.is_multilabel else summary_of_classes(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives only, so that it loads with ``weights_only=True``."""
        # A data set lists its files in the fit that goes on, too.
        state = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "files"}
        if self.noise_rate_interval is not None:
            state["noise_rate_interval"] = list(self.noise_rate_interval)
        state["often_called"] = [list(pair) for pair in self.often_called]
        state["status"], state["class_names"] = self.status.value, list(self.class_names)
        state["keys"] = list(self.keys)
        return {"version": STATE_VERSION, **state}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Partition:
        """Return the partition that :meth:`state_dict` described.

        Raises:
            ValueError: if the state was written by another version of the format, or holds something else.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"Expected the state of a partition, a dict, but got a {type(state).__name__}.")
        state = {str(name): value for name, value in state.items()}
        if (version := state.pop("version", None)) != STATE_VERSION:
            raise ValueError(
                f"Expected a partition of format version {STATE_VERSION}, but got version {shown(version)}."
            )
        if faults := list(faults_of(cls, state)):
            raise ValueError(f"Expected the state of a partition, but {'; '.join(faults[:5])}.")
        return cls(**state)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the partition to a file that :meth:`load` reads: an npz archive of arrays, without a pickle.

        Args:
            path: file to write, under this very name; folders are made. What was there is replaced in one step.
        """
        save_record(self, STATE_VERSION, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Partition:
        """Read a partition that :meth:`save` wrote; no code is unpickled.

        Raises:
            ValueError: for any other file, saying what to do.
        """
        return load_record(cls, STATE_VERSION, path)

    def to_csv(
        self,
        path: str | PathLike[str],
        *,
        suspects_only: bool = True,
        review: int = 0,
        class_names: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a table of samples, the most suspect first.

        What each column holds is said on the page "Report, review, exports" of the documentation, under "Columns". In
        ``decision``, which is empty, a person may write ``keep``, ``drop`` or ``relabel``, and correct
        ``suggested_label``; in the next fit ``AttributionPartitionCallback(review=path)`` goes by the rows that have a
        decision.

        Args:
            path: file to write; folders are made.
            suspects_only: leave out the samples that are clean.
            review: how many of the other samples are in the table too, the first of :meth:`review_ranking`; all
                that are worth a look are ``partition.worth_review()``.
            class_names: the name of every class, by label; by default the partition's own. One that a spreadsheet would
                take for a formula gets a single quote in front.
            columns: further ones by their title, of N values each, by dataset index: file names, for example. They
                stand right of the index.
            overwrite: write over a table in which a person has decided something, too.

        Raises:
            ValueError: if there is not one name per class, one value per sample, or a title is taken; for a table with
                decisions of a person in its place, unless ``overwrite``.
        """
        if not check_flag("overwrite", overwrite):
            check_undecided(path, "give another path, rename it, or set overwrite=True")
        names = self.known_names(class_names)
        found = columns_of(self, suspects_only=suspects_only, review=review, names=names, columns=columns)
        write_csv(path, found)

    def plot(
        self,
        ax: Axes | Sequence[Axes] | None = None,
        *,
        kind: Literal["both", "histogram", "confusion"] = "both",
        class_names: Sequence[str] | None = None,
    ) -> tuple[Figure, Any]:
        """Draw the histogram of p(clean) with the cut, and which labels are suggested for which given ones.

        Args:
            ax: where to draw; two axes for both. By default in a new figure.
            kind: both, or one of the two.
            class_names: the name of every class, by label; by default the partition's own.

        Returns:
            the matplotlib figure and its axes, two of them for both.

        Raises:
            ImportError: without matplotlib: ``pip install matplotlib``.
            ValueError: for another kind, too few or too many axes, or not one name per class.
        """
        from lightning_unlearn.results.plots import plot_partition

        return plot_partition(self, ax, kind=kind, class_names=class_names)

    def remember_files(self, files: Sequence[str]) -> None:
        """Take the paths of the samples' files, for tables.

        Args:
            files: N paths, by index, or none.

        Raises:
            ValueError: for another number.
        """
        if files and len(files) != len(self):
            raise ValueError(f"Expected a file for each of {len(self)} samples, but got {len(files)}.")
        # The class is frozen for everybody else.
        object.__setattr__(self, "files", tuple(map(str, files)))

    def known_names(self, class_names: Sequence[str] | None = None) -> dict[int, str] | None:
        """Return every class's name, by label: as given, else as the data set lists it; None where neither has one.

        Raises:
            ValueError: if there is not one name per class.
        """
        names = self.class_names if class_names is None else class_names
        return self.names_of(names) if class_names is not None or names else None

    def names_of(self, class_names: Sequence[str]) -> dict[int, str]:
        """Return what every class is called, by label.

        Raises:
            ValueError: if there is not one name per class.
        """
        # A recipe that estimates no noise does not say how many classes there are.
        classes = len(self.noise_matrix)
        seen = int(torch.cat([self.label, self.suggested_label]).max()) + 1 if len(self) else 0
        if self.is_multilabel:
            classes = self.label.shape[1]
        is_text = isinstance(class_names, str)
        names = [] if is_text else check_names("class_names", class_names, "names", each_once=False)
        if is_text or len(names) < seen or (classes and len(names) != classes):
            found = f"the text {class_names!r}" if is_text else f"{len(names)} names"
            raise ValueError(f"Expected class_names to name each of {classes or seen} classes, but got {found}.")
        return dict(enumerate(names))


def _put(partition: Partition, **values: Any) -> None:
    # The class is frozen for everybody else.
    for name, value in values.items():
        object.__setattr__(partition, name, value)


def _names_of(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(check_names("class_names", names, "names", each_once=False)) if names else ()
