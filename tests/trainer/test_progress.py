"""What a fit shows of its passes in the Trainer's own progress bar."""

import io
import logging
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_unlearn.callbacks.base import FitCallback
from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.trainer import progress as progress_module
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.progress import close_progress, shown
from tests.toys import Blobs, BlobsData, Toy, fit, partition_callback
from tests.toys import quick_trio as trio

AT, SIZE = 2, 101
BATCHES = -(-SIZE // 16)
# One neuron, so one step of the guard.
PRUNES = {"criterion": Sensitivity(fdr_level=None), "max_val_drop": 1.0, "amount": 0.05}
# Two passes for evidence; validation before, which the guard goes by too; the regression; the guard's score after a
# step; validation after.
PASSES = [
    ("Evidence", BATCHES),
    ("Evidence", BATCHES),
    ("Score", 2),
    ("Neurons", BATCHES),
    ("Score", 2),
    ("Score", 2),
]

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")


class Tqdm(TQDMProgressBar):
    """Keeps the lines that it makes for validation."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lines = []

    def init_validation_tqdm(self):
        line = super().init_validation_tqdm()
        line.mininterval = 0
        self.lines.append(line)
        return line

    def ours(self):
        return [(line.desc.removesuffix(": "), line.n, line.total) for line in self.lines if "Valid" not in line.desc]


class Rich(RichProgressBar):
    """Draws into nothing."""

    def __init__(self):
        super().__init__(console_kwargs={"file": io.StringIO(), "force_terminal": True})

    def ours(self):
        tasks = [task for task in self.progress.tasks if not re.match("Epoch|Valid|Sanity", task.description)]
        return [(task.description, task.completed, task.total) for task in tasks]


class Other(ProgressBar):
    """Somebody else's."""

    def __init__(self):
        super().__init__()
        self.is_on = True

    def disable(self):
        self.is_on = False


def a_fit(*bars, module=None, **kwargs):
    callbacks = trio(AT, prune=PRUNES, evidence_from="eval_passes")
    kwargs = {"enable_progress_bar": True, "max_epochs": 3, **kwargs}
    return fit(module or Toy(), BlobsData(Blobs(SIZE)), [*bars, *callbacks], **kwargs)


@pytest.mark.parametrize("kind", [Tqdm, Rich])
def test_a_line_for_each_pass_counts_its_batches_and_goes(kind, capsys):
    if kind is Rich:
        pytest.importorskip("rich")
    bar = kind()
    a_fit(bar)
    assert bar.ours() == [(title, count, count) for title, count in PASSES]
    if kind is Tqdm:
        assert not [line for line in bar.lines if line in type(line)._instances]
        assert re.search(rf"Evidence: .*{BATCHES}/{BATCHES} \[00:\d\d<00:\d\d, +[\d.]+it/s\]", capsys.readouterr().out)
    else:
        assert not [task for task in bar.progress.tasks if task.visible and not task.description.startswith("Epoch")]


def test_the_bar_draws_as_often_as_it_is_asked_to():
    bar = Tqdm(refresh_rate=3)
    counts = [bar.lines[0].n for _ in shown(stand_in(bar), "Evidence", 8, range(8))]
    assert counts == [0, 0, 0, 3, 3, 3, 6, 6]
    assert bar.ours() == [("Evidence", 8, 8)]


LINES = []  # not of the model, which is put back as it was


class Breaks(Toy):
    """Fails in the middle of the pass after the second epoch."""

    def forward(self, x):
        self.calls = 0 if self.training or self.current_epoch < AT else self.calls + 1
        if self.calls == 3:
            LINES.append(next(one for one in self.trainer.callbacks if isinstance(one, FitCallback)).fit.memory.lines)
            assert len(LINES[0]) == 1
            raise OSError("in the pass")
        return super().forward(x)


@pytest.mark.parametrize("kind", [Tqdm, Rich])
def test_a_pass_that_fails_leaves_no_line(kind):
    if kind is Rich:
        pytest.importorskip("rich")
    bar = kind()
    LINES.clear()
    with pytest.raises(OSError, match="in the pass"):
        a_fit(bar, module=Breaks())
    title, done, total = bar.ours()[-1]
    assert title == "Evidence"
    assert done < total
    if kind is Tqdm:
        assert bar.lines[-1] not in type(bar.lines[-1])._instances
    else:
        assert not bar.progress.tasks[-1].visible
    assert LINES == [[]]


def test_without_a_bar_and_in_those_of_others_nothing_is_shown(capsys):
    a_fit(enable_progress_bar=False)
    a_fit(Other())
    assert "Evidence" not in "".join(capsys.readouterr())


def stand_in(bar):
    """A fit of a Trainer that has a progress bar and little else."""
    trainer = type("ATrainer", (), {"progress_bar_callback": bar, "state": SimpleNamespace(fn="fit")})()
    if bar is not None:
        bar._trainer = trainer
    return FitContext(trainer, None, None)


def test_on_other_ranks_nothing_is_shown():
    bar = Tqdm()
    bar.disable()
    assert list(shown(stand_in(bar), "Evidence", 3, range(3))) == [0, 1, 2]
    assert bar.lines == []


def test_a_rich_bar_that_has_not_begun_is_left_alone():
    pytest.importorskip("rich")
    assert list(shown(stand_in(Rich()), "Evidence", None, range(3))) == [0, 1, 2]


def test_lines_of_a_fit_are_closed_and_of_no_other():
    one, other = Tqdm(), Tqdm()
    fits = [stand_in(one), stand_in(other)]
    passes = [shown(context, "Score", None, range(3)) for context in fits]
    for items in passes:
        next(items)
    close_progress(fits[0])
    assert one.lines[0].disable or one.lines[0] not in type(one.lines[0])._instances
    assert other.lines[0] in type(other.lines[0])._instances
    close_progress(fits[1])


def test_what_a_long_pass_will_take_is_said_once_at_the_speed_so_far(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    clock = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    context = stand_in(None)
    for item in shown(context, "Evidence", 100, range(100)):
        clock[0] += 60 if item == 0 else 2  # workers start with the first batch
    for _ in shown(context, "Evidence", 100, range(100)):
        clock[0] += 2
    assert [record.getMessage() for record in caplog.records] == [
        "Evidence: 6 of 100 batches in 10 s, about 188 s left."
    ]


def test_of_a_short_pass_nothing_is_said(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    assert len(list(shown(stand_in(None), "Evidence", 100, range(100)))) == 100
    assert not caplog.records


@pytest.mark.parametrize(("method", "times"), [("gradient_x_activation", 1), ("integrated_gradients", 0)])
def test_what_a_pass_will_cost_is_said_once_before_the_first(method, times, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    callback = partition_callback(at_epoch=2, evidence_from="eval_passes", attribution_method=method)
    fit(Toy(), BlobsData(Blobs(SIZE)), [callback], max_epochs=3)
    said = [record.getMessage() for record in caplog.records]
    found = [
        at
        for at, line in enumerate(said)
        if re.match(r"Scoring 101 training samples\..* training epoch \(\d+\.\d s\)", line)
    ]
    assert len(found) == times
    if times:
        assert found[0] < next(at for at, line in enumerate(said) if line.startswith("Partition after"))
