"""When a report is written, and of what."""

import json
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy

from lightning_unlearn import UnlearnReport
from lightning_unlearn.cli import main
from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.report import RunRecord
from lightning_unlearn.trainer.compat import MisconfigurationException
from tests.toys import Blobs, BlobsData, Toy, assert_same_weights, fit, mlp, weights
from tests.toys import quick_trio as trio

NAMES = ["north", "<script>alert(1)</script>", "south", "west"]
EPOCHS, AT = 4, 2
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")


class Logs(Toy):
    """Logs the accuracy of the first batch in every second validation, and something only at the end of an epoch."""

    def validation_step(self, batch):
        super().validation_step(batch)
        if self.current_epoch % 2 == 0:
            self.log("val_sometimes", float(self.current_epoch))

    def on_train_epoch_end(self):
        self.log("late", float(self.current_epoch))


def a_fit(report, *, module=None, data=None, **kwargs):
    callbacks = trio(AT, prune={"criterion": Sensitivity(fdr_level=None), "max_val_drop": None, "amount": 0.2})
    module = module or Logs(mlp)
    # First in the list, where it would find nothing if it did not wait.
    fit(module, data or BlobsData(Blobs(image=False)), [report, *callbacks], **{"max_epochs": EPOCHS, **kwargs})
    return module, callbacks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    report = UnlearnReport(folder, class_names=NAMES, samples=20)
    module, callbacks = a_fit(report)
    return folder, module, callbacks, RunRecord.load(folder), report


def test_what_was_found_and_done_is_in_the_run_directory(run):
    folder, _, (partition, prune, finetune), record, report = run
    assert report.path == folder / "report.html"
    assert record.partition.clean_probability.equal(partition.partition.clean_probability)
    assert [mask.layer for mask in record.masks] == [prune.mask.layer]
    assert record.masks[0].keep.equal(prune.mask.keep)
    assert record.summary["advice"] == partition.summary.advice
    assert record.summary["done"] == [prune.summary_clause(), finetune.summary_clause()]
    assert record.swaps == [AT]
    assert record.suspect_precision == 0.85
    assert record.fit["epochs"] == EPOCHS


def test_where_it_comes_from_is_said_once_and_as_the_checkpoint_says_it(run, tmp_path):
    folder, _, (partition, prune, finetune), record, _ = run
    partition.save_provenance(tmp_path / "provenance.json")
    written = json.loads((folder / "run.json").read_text())["provenance"]
    assert written == json.loads((tmp_path / "provenance.json").read_text()) == record.provenance
    page = (folder / "report.html").read_text()
    dropped = sorted(set(range(len(partition.partition))) - set(finetune.training_subset.index.tolist()))
    assert ", ".join(map(str, dropped)) in page
    assert ", ".join(map(str, prune.mask.pruned_indices().tolist())) in page
    assert '"action":"dropped"' in page
    # What the page advises, for who wants to decide otherwise.
    worth = partition.partition.worth_review()
    review = " --review" if worth else ""
    assert f"<code>lightning-unlearn show .{review} --csv suspects.csv</code> in the run directory" in page
    main(["show", str(folder), *review.split(), "--csv", str(tmp_path / "suspects.csv")])
    rows = (tmp_path / "suspects.csv").read_text(encoding="utf-8-sig").splitlines()
    assert len(rows) == 1 + len(partition.partition.suspect_indices()) + worth


def test_the_gallery_is_of_the_most_suspect_samples_as_the_data_set_has_them(run):
    folder, _, (partition, *_), record, _ = run
    expected = partition.partition.suspect_indices()[:20].tolist()
    assert list(record.gallery) == expected
    rows = record.gallery[expected[0]]["rows"]
    value = Blobs().x[expected[0]]
    assert rows[:2] == [["0", f"{value[0]:.4g}"], ["1", f"{value[1]:.4g}"]]
    page = (folder / "report.html").read_text()
    assert "20 most suspect of" in page
    assert "alert(1)</script>" not in page


def test_curves_have_a_point_for_each_epoch_in_which_a_metric_was_logged(run):
    _, module, _, record, _ = run
    assert [epoch for epoch, _ in record.curves["val_loss"]] == list(range(EPOCHS))
    assert record.curves["late"] == [[epoch, epoch] for epoch in range(EPOCHS)]
    assert record.curves["val_sometimes"] == [[0, 0], [2, 2]]
    assert len(record.curves["training loss"]) == EPOCHS
    assert record.curves["val_loss"][-1][1] == pytest.approx(float(module.trainer.callback_metrics["val_loss"]))


def test_the_training_loss_is_the_mean_of_the_steps_whatever_makes_a_step(tmp_path):
    seen = []

    class Records(Toy):
        def training_step(self, batch):
            loss = cross_entropy(self(batch[0]), batch[1])
            seen.append((self.current_epoch, float(loss.detach())))
            return loss

    report = UnlearnReport(tmp_path, samples=0)
    a_fit(report, module=Records(mlp), accumulate_grad_batches=2)
    for epoch, value in RunRecord.load(tmp_path).curves["training loss"]:
        assert value == pytest.approx(np.mean([loss for at, loss in seen if at == epoch]), rel=1e-4)


def test_seconds_are_those_of_the_phases(run):
    *_, (partition, prune, finetune), record, _ = run
    assert record.seconds["evidence passes, partition"] == partition.seconds
    assert record.seconds["pruning"] == prune.seconds
    assert record.seconds["swap to the clean subset"] == finetune.seconds
    phases = sum(seconds for name, seconds in record.seconds.items() if name != "fit")
    assert 0 < phases < record.seconds["fit"]
    assert record.seconds["validation"] > 0


def test_the_command_makes_the_same_page_again(run, tmp_path, capsys):
    folder, *_ = run
    main(["report", str(folder), "--out", str(tmp_path / "again.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == (folder / "report.html").read_text()
    main(["report", str(folder), "--control", str(folder), "--out", str(tmp_path / "control.html")])
    assert "val_loss, control" in (tmp_path / "control.html").read_text()


def test_weights_and_random_states_are_those_of_a_fit_without_it(run, tmp_path):
    class Draws(Blobs):
        def __getitem__(self, index):
            random.random()
            np.random.rand()  # noqa: NPY002  (the global one is meant)
            torch.rand(1)
            return super().__getitem__(index)

    ends = []
    for beside in ([UnlearnReport(tmp_path)], []):
        module = Toy(mlp)
        fit(module, BlobsData(Draws(augment="torch")), [*beside, *trio(AT)], max_epochs=3)
        ends.append((weights(module), random.random(), np.random.rand(), torch.rand(1)))  # noqa: NPY002
    assert_same_weights(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_the_folder_is_in_the_loggers_or_the_trainers(tmp_path):
    report = UnlearnReport(samples=0)
    a_fit(report, logger=CSVLogger(tmp_path, name="mine"))
    assert report.path == tmp_path / "mine" / "version_0" / "unlearn" / "report.html"
    assert report.path.is_file()
    a_fit(report, default_root_dir=tmp_path)
    assert report.path == tmp_path / "unlearn" / "report.html"
    assert report.path.is_file()


def test_what_cannot_be_shown_is_said_once_and_the_rest_is(tmp_path):
    answers = iter([KeyError("no picture"), 3, None])

    def render(sample):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.warns(UserWarning, match="Some samples cannot be shown in the report: sample .*no picture"):
        a_fit(UnlearnReport(tmp_path, samples=3, render=render))
    cards = list(RunRecord.load(tmp_path).gallery.values())
    wanted = "TypeError: Expected render to return text, a dict, a PIL image or the bytes of a PNG, but got"
    assert [card["text"] for card in cards] == ["KeyError: 'no picture'", f"{wanted} int.", f"{wanted} NoneType."]
    assert {card["kind"] for card in cards} == {"fault"}


def test_a_report_that_cannot_be_written_does_not_end_the_fit(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="Could not write the report: ValueError: Expected a folder to write to"):
        module, _ = a_fit(UnlearnReport(tmp_path / "file"))
    assert module.trainer.state.finished


def test_a_fit_that_ends_before_the_partition_is_due_has_a_report_of_the_one_drawn_at_its_end(tmp_path):
    with pytest.warns(UserWarning, match="due when 2 epochs are complete, is computed now, too late to prune"):
        _, (partition, *_) = a_fit(UnlearnReport(tmp_path / "run"), max_steps=3)
    record = RunRecord.load(tmp_path / "run")
    assert record.partition.clean_probability.equal(partition.partition.clean_probability)
    assert not record.masks
    assert not record.swaps
    assert (tmp_path / "run" / "report.html").exists()


def test_too_few_names_are_refused_before_the_first_step(tmp_path):
    module = Logs(mlp)
    with pytest.raises(ValueError, match="Expected class_names to name each of 4 classes, but got 2 names"):
        a_fit(UnlearnReport(tmp_path, class_names=["a", "b"]), module=module)
    assert module.steps == 0


def test_without_a_partition_there_is_nothing_to_report():
    with pytest.raises(MisconfigurationException, match="UnlearnReport needs an AttributionPartitionCallback"):
        fit(Toy(mlp), BlobsData(Blobs()), [UnlearnReport()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": -1}, "Expected samples to be at least 0, but got -1"),
        ({"class_names": "ab"}, "Expected class_names to be a list of names, but got the text 'ab'"),
        ({"channels": "middle"}, "Expected channels to be"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        UnlearnReport(**options)


def test_a_resumed_fit_has_the_curves_of_the_whole(tmp_path):
    keep = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="at", every_n_epochs=2, save_top_k=-1)
    report = UnlearnReport(tmp_path / "first", samples=0)
    fit(Logs(mlp), BlobsData(Blobs()), [report, *trio(AT), keep], max_epochs=3, enable_checkpointing=True)
    again = UnlearnReport(tmp_path / "second", samples=0)
    fit(Logs(mlp), BlobsData(Blobs()), [again, *trio(AT)], max_epochs=5, ckpt_path=tmp_path / "at.ckpt")
    curves = RunRecord.load(tmp_path / "second").curves
    assert [epoch for epoch, _ in curves["val_loss"]] == [0, 1, 2, 3, 4]
    assert json.loads((tmp_path / "second" / "run.json").read_text())["swaps"] == [AT]


def test_a_dry_run_says_so(tmp_path):
    callbacks = trio(
        AT, dry_run=True, prune={"criterion": Sensitivity(fdr_level=None), "max_val_drop": None, "amount": 0.2}
    )
    fit(Toy(mlp), BlobsData(Blobs()), [UnlearnReport(tmp_path, samples=0), *callbacks], max_epochs=3)
    assert "neurons that would be pruned" in (tmp_path / "report.html").read_text()
    assert RunRecord.load(tmp_path).swaps == []


def test_a_state_is_a_copy():
    report = UnlearnReport()
    report._curves = {"val_loss": [[0, 1.0]]}
    state = report.state_dict()
    report._curves["val_loss"].append([1, 0.5])
    assert state == {"curves": {"val_loss": [[0, 1.0]]}}
    state["curves"]["val_loss"].clear()
    assert report.state_dict() == {"curves": {"val_loss": [[0, 1.0], [1, 0.5]]}}
