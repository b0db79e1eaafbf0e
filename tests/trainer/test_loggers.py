"""What the Trainer's loggers are told, read back from what they wrote."""

import csv
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.results import plots
from lightning_unlearn.trainer import loggers as loggers_module
from lightning_unlearn.trainer.context import FitContext
from tests.toys import Blobs, BlobsData, Toy, fit
from tests.toys import quick_trio as trio

AT, SIZE = 1, 101
PRUNES = {"criterion": Sensitivity(fdr_level=None), "max_val_drop": 1.0}
SCALARS = {
    "noise_rate",
    "kept_share",
    "suspects",
    "suspects_label",
    "suspects_input",
    "suspects_both",
    "seconds_pass",
    "seconds_pruning",
    "seconds_guard",
    "pruned_neurons",
    "val_accuracy_before",
    "val_accuracy_after",
}
PICTURES = {"unlearn/partition", "unlearn/neurons_net.4"}

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")


def a_fit(*loggers, callbacks=None, **kwargs):
    callbacks = callbacks or trio(AT, prune=PRUNES)
    fit(Toy(), BlobsData(Blobs(SIZE)), callbacks, max_epochs=3, logger=list(loggers), log_every_n_steps=50, **kwargs)
    return callbacks


def expected(callbacks):
    """What can be said of a fit beside how long it took."""
    partition, summary, mask = callbacks[0].partition, callbacks[0].summary, callbacks[1].mask
    reasons = partition.reasons()
    return {
        "noise_rate": partition.noise_rate,
        "kept_share": partition.is_clean.float().mean().item(),
        "suspects": summary.suspects,
        **{f"suspects_{word}": reasons.count(word) for word in ("label", "input", "both")},
        "pruned_neurons": len(mask.pruned_indices()),
        "val_accuracy_before": summary.accuracy_before,
        "val_accuracy_after": summary.accuracy_after,
    }


def check(found, callbacks):
    assert found.keys() >= SCALARS
    for name, value in expected(callbacks).items():
        assert found[name] == pytest.approx(value, abs=1e-4), name
    assert found["suspects"] > 0
    assert found["pruned_neurons"] > 0
    for phase in ("pass", "pruning", "guard"):
        assert 0 < found[f"seconds_{phase}"] < 60


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """A logger with a store of files, which asks nothing of a network."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow would rather see replaced
    pytest.importorskip("mlflow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")


def test_tensorboard_and_csv_are_told_in_one_fit(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    tensorboard, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path, "csv")
    callbacks = a_fit(tensorboard, table)
    events = accumulator.EventAccumulator(tensorboard.log_dir)
    events.Reload()
    scalars = [tag for tag in events.Tags()["scalars"] if tag.startswith("unlearn/")]
    check({tag.removeprefix("unlearn/"): events.Scalars(tag)[-1].value for tag in scalars}, callbacks)
    assert set(events.Tags()["images"]) == PICTURES
    (picture,) = events.Images("unlearn/partition")
    assert (picture.height, picture.width) == (500, 1200)
    assert picture.step == 7 * AT
    with Path(table.log_dir, "metrics.csv").open() as file:
        cells = {name: float(row[name]) for row in csv.DictReader(file) for name in row if row[name]}
    check({name.removeprefix("unlearn/"): value for name, value in cells.items()}, callbacks)


def test_mlflow_is_told(mlflow):
    pytest.importorskip("matplotlib")
    callbacks = a_fit(mlflow)
    run = mlflow.experiment.get_run(mlflow.run_id)
    check({name.removeprefix("unlearn/"): value for name, value in run.data.metrics.items()}, callbacks)
    files = {file.path: file.file_size for file in mlflow.experiment.list_artifacts(mlflow.run_id, "unlearn")}
    assert set(files) == {f"{name}_step_{7 * AT}.png" for name in PICTURES}
    assert all(size > 5000 for size in files.values())
    folder = Path(mlflow.experiment.get_run(mlflow.run_id).info.artifact_uri.removeprefix("file://"))
    assert (folder / f"unlearn/partition_step_{7 * AT}.png").read_bytes().startswith(b"\x89PNG")


class Wandb(WandbLogger):
    """Lightning's own, but for the run that it would ask of the network."""

    def __init__(self):
        self.told = []
        self._prefix, self._wandb_init, self._save_dir = "", {}, "."
        self._name = self._id = self._checkpoint_callback = None

    @property
    def experiment(self):
        return SimpleNamespace(log=self.told.append)

    def finalize(self, status):
        pass


def test_wandb_is_told(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda image: image))
    logger = Wandb()
    a_fit(logger)
    found = {name: value for values in logger.told for name, value in values.items()}
    assert {f"unlearn/{name}" for name in SCALARS} | PICTURES <= found.keys()
    (picture,) = found["unlearn/partition"]
    assert (picture.dtype, picture.shape) == (np.uint8, (500, 1200, 3))
    assert [values["trainer/global_step"] for values in logger.told if "unlearn/partition" in values] == [7 * AT]


class Board(TensorBoardLogger):
    """Writes nothing, and keeps what it is shown, or fails."""

    def __init__(self, error=None):
        self.shown, self.error = [], error

    @property
    def experiment(self):
        return SimpleNamespace(add_figure=self._add_figure)

    def _add_figure(self, name, figure, global_step):
        if self.error is not None:
            raise self.error
        self.shown.append(name)

    def _nothing(self, *args, **kwargs):
        pass

    log_metrics = log_hyperparams = log_graph = save = finalize = _nothing
    name = version = save_dir = root_dir = log_dir = ""


def show(loggers, names=("a", "b"), draw=lambda: "figure", is_global_zero=True):
    trainer = type("ATrainer", (), {"is_global_zero": is_global_zero})()
    context = FitContext(trainer, SimpleNamespace(loggers=loggers, global_step=3), None)
    for name in names:
        loggers_module.log_figure(context, name, draw)


def test_a_logger_that_cannot_draw_is_said_once_and_costs_nothing():
    pytest.importorskip("matplotlib")
    failing, other = Board(OSError("the disk is full")), Board()
    with pytest.warns(UserWarning, match="Board failed to log figure 'a'") as said:
        show([failing, other])
    assert [str(one.message) for one in said] == [
        "Board failed to log figure 'a' (OSError: the disk is full). Figures are disabled for this logger."
    ]
    assert other.shown == ["a", "b"]


def test_a_fit_goes_on_where_pictures_fail(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(loggers_module, "plot_partition", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="failed to log figure 'unlearn/partition'"):
        callbacks = a_fit(Board())
    assert callbacks[0].summary.suspects > 0


def refuse():
    raise AssertionError("nobody was to see it")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", ["csv", "no loggers", "another rank", "no matplotlib"])
def test_nothing_is_drawn_that_nobody_sees(case, monkeypatch, tmp_path):
    loggers = {"csv": [CSVLogger(tmp_path)], "no loggers": []}.get(case, [Board()])
    if case == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    show(loggers, draw=refuse, is_global_zero=case != "another rank")
    assert [board.shown for board in loggers if isinstance(board, Board)] in ([], [[]])


def test_pictures_of_a_fit_leave_no_figure_open():
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_fignums()
    figures = [plots.new_axes(count)[0].figure for count in (1, 2)]
    show([Board()], draw=figures.pop)
    assert plt.get_fignums() == before
