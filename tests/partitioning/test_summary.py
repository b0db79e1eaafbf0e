"""What a fit with repair is said to have come to."""

import copy
import logging
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback
from lightning_unlearn.partitioning import run as partition_module
from lightning_unlearn.partitioning.apply_recipe import apply_recipe
from lightning_unlearn.partitioning.summary import Accuracies, summarize
from lightning_unlearn.pruning import run as run_module
from lightning_unlearn.pruning.ranking import rank_neurons
from lightning_unlearn.results.labels import REASONS
from tests.callbacks.published import make_partition
from tests.toys import Blobs, BlobsData, Toy, fit, mlp, trio

LABEL = REASONS.index("label")
AT = 3
SOME = 15  # epochs after which some wrong labels are memorized


class Snapshot(L.Callback):
    """The network as it is when the partition is about to be drawn."""

    def __init__(self, at):
        self.at = at

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.at - 1:
            self.net = copy.deepcopy(pl_module.net)


class Unlike(BlobsData):
    """Validates on noisy samples, which nobody gets all right, of which the last batch is not full."""

    def val_dataloader(self):
        return DataLoader(Blobs(45, 0.3, seed=11), batch_size=16)


@torch.no_grad()
def accuracy(net, x, y):
    return (copy.deepcopy(net).eval()(x).argmax(1) == y).float().mean().item()


def memorizing(module):
    return torch.optim.Adam(module.parameters(), lr=0.02)


def creeping(module):
    return torch.optim.SGD(module.parameters(), lr=0.02)


def a_fit(*, optimizer=memorizing, at=AT, epochs=6, data=None, beside=(), dry=False, partners=True, **kwargs):
    data = data or Unlike(Blobs())
    callbacks = trio(at, dry_run=dry, **kwargs)
    snapshot, module = Snapshot(at), Toy(mlp, optimizer)
    ours = callbacks if partners else callbacks[:1]
    fit(module, data, [*ours, snapshot, *beside], max_epochs=epochs)
    return callbacks, snapshot, module, data


pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{line}:UserWarning")
    for line in ("You defined a `validation_step`", "Training has ended")
]


@pytest.fixture(scope="module")
def repaired():
    torch.set_num_threads(1)
    return a_fit(at=SOME, epochs=SOME + 4, finetune={"lr": 0.02})


def test_counts_are_those_of_the_partition(repaired):
    (partition, _, _), *_ = repaired
    summary, drawn = partition.summary, partition.partition
    assert summary.samples == 203
    assert summary.suspects == int((~drawn.is_clean).sum()) > 30
    assert summary.noise_rate == drawn.noise_rate


def test_what_was_memorized_is_how_often_the_network_gave_suspects_their_label(repaired):
    (partition, _, _), snapshot, _, data = repaired
    suspects = (partition.partition.reason == LABEL).nonzero().flatten()
    assert len(suspects) > 30
    expected = accuracy(snapshot.net, data.train.x[suspects], data.train.y[suspects])
    assert partition.summary.memorized == pytest.approx(expected)
    assert 0 < expected < 1


def test_accuracies_are_those_of_the_model_before_pruning_and_at_the_end(repaired):
    (partition, _, _), snapshot, module, data = repaired
    held_out = data.val_dataloader().dataset
    before, after = (accuracy(net, held_out.x, held_out.y) for net in (snapshot.net, module.net))
    assert before != after
    assert partition.summary.accuracy_before == pytest.approx(before)
    assert partition.summary.accuracy_after == pytest.approx(after)


def test_what_was_done_is_what_the_callbacks_say(repaired):
    (partition, prune, finetune), *_ = repaired
    assert partition.summary.done == tuple(
        clause for clause in (prune.summary_clause(), finetune.summary_clause()) if clause
    )
    kept = int(partition.partition.is_clean.sum())
    assert finetune.summary_clause() == f"trained on {kept} clean samples from epoch {SOME} on (F-FT)"
    assert finetune.summary_clause() in partition.summary.advice


def test_what_the_callbacks_took_is_counted_once_and_anew_in_each_fit(monkeypatch):
    now = [0]

    def slowly(function, seconds):
        def run(*given):
            now[0] += seconds
            return function(*given)

        return run

    *_, finetune = callbacks = trio(1)
    monkeypatch.setattr("lightning_unlearn.callbacks.base.time", SimpleNamespace(perf_counter=lambda: now[0]))
    # The one that prunes asks the one that partitions, whose time is not its own.
    monkeypatch.setattr(partition_module, "apply_recipe", slowly(apply_recipe, 100))
    monkeypatch.setattr(run_module, "rank_neurons", slowly(rank_neurons, 10))
    monkeypatch.setattr(finetune._finetuning, "attach", slowly(finetune._finetuning.attach, 1))
    for _ in range(2):
        fit(Toy(mlp), BlobsData(Blobs()), reversed(callbacks), max_epochs=2)
        assert [callback.seconds for callback in callbacks] == [100, 10, 1]


def test_the_validation_loaders_may_be_limited():
    data = Unlike(Blobs())
    callbacks, snapshot, module = trio(AT), Snapshot(AT), Toy(mlp, memorizing)
    fit(module, data, [*callbacks, snapshot], max_epochs=5, limit_val_batches=1)
    held_out = data.val_dataloader().dataset
    before, after = (accuracy(net, held_out.x[:16], held_out.y[:16]) for net in (snapshot.net, module.net))
    summary = callbacks[0].summary
    assert (summary.accuracy_before, summary.accuracy_after) == pytest.approx((before, after))


def test_advice_where_nothing_is_noisy():
    with pytest.warns(UserWarning, match="Partition not applied"):
        (partition, _, finetune), *_ = a_fit(data=Unlike(Blobs(noise=0)))
    summary = partition.summary
    assert (partition.partition.status, partition.partition.noise_rate, summary.noise_rate) == ("all_clean", None, None)
    caveat = partition.partition.warning
    assert caveat.startswith("no suspects were found in this fit (errors between easily confused classes ")
    found = f"All 203 training samples were classified as clean, and nothing was changed: {caveat}. Partition.to_csv"
    assert summary.advice.startswith(found)
    plain = make_partition(torch.ones(8), torch.arange(8) % 4, warning="it calls all clean", status="all_clean")
    said = summarize(plain, memorized=None, done=(), accuracy=Accuracies()).advice
    assert said.startswith("No sign of noise in the 8 training samples: nothing was changed. Partition.to_csv")
    assert (summary.suspects, summary.memorized, summary.done) == (0, None, ())
    assert (summary.accuracy_before, summary.accuracy_after) == (None, None)
    assert not finetune.is_active


@pytest.mark.parametrize(("optimizer", "at"), [(memorizing, 40), (creeping, 2)], ids=["memorized", "not memorized"])
def test_one_sentence_before_says_what_is_to_be_won_and_one_after_what_was(optimizer, at, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    (partition, _, _), *_ = a_fit(optimizer=optimizer, at=at, epochs=at + 1, every_n_epochs=5)
    summary, is_memorized = partition.summary, at == 40
    assert (summary.memorized >= 0.5) == is_memorized
    assert (
        f"The network predicted {summary.memorized:.0%} of the suspect labels when the partition was computed."
        in summary.advice
    )
    assert summary.advice.startswith(f"{summary.suspects} of 203 training samples are suspect ({summary.suspects} for")
    assert f"estimated noise rate {summary.noise_rate:.1%}" in summary.advice
    said = [record.getMessage() for record in caplog.records]
    before = "The accuracy lost to memorized labels" if is_memorized else "Little to gain in one epoch: fine-tuning"
    (place,) = (at for at, line in enumerate(said) if line.startswith(before))
    assert said.count(summary.advice) == 1
    assert place < said.index(summary.advice)
    assert sum("not memorized" in line for line in said) == (not is_memorized)
    assert not any("every_n_epochs" in line for line in said)


def test_the_best_validation_before_the_partition_is_kept_and_compared_with():
    class Records(L.Callback):
        def __init__(self):
            self.seen = []

        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking and trainer.current_epoch < SOME:
                held_out = data.val_dataloader().dataset
                self.seen.append(accuracy(pl_module.net, held_out.x, held_out.y))

    data, records = Unlike(Blobs()), Records()
    (partition, _, _), *_ = a_fit(at=SOME, epochs=SOME + 2, data=data, beside=[records])
    summary = partition.summary
    assert len(records.seen) == SOME
    assert summary.best_accuracy_before == pytest.approx(max(records.seen))
    assert max(records.seen) > records.seen[-1]  # else it would say nothing new
    assert summary.accuracy_before == pytest.approx(records.seen[-1])
    assert f", {summary.best_accuracy_before:.3f} at best before it (" in summary.advice
    notes = partition.state_dict()["when"]["notes"]
    assert [notes[str(epoch)]["accuracy"] for epoch in range(1, SOME + 1)] == pytest.approx(records.seen)
    assert all(value == value for note in notes.values() for value in note.values())  # none is NaN
    found = partition.provenance["accuracy"]
    assert found["best_before"] == summary.best_accuracy_before


def test_advice_without_validation_data():
    data = DataLoader(Blobs(), batch_size=16, shuffle=True)
    (partition, _, _), *_ = a_fit(data=data)
    summary = partition.summary
    assert (summary.accuracy_before, summary.accuracy_after) == (None, None)
    assert summary.advice.endswith("The effect is unknown: there are no validation data.")


def test_advice_of_the_partition_alone():
    (partition, _, _), *_ = a_fit(partners=False)
    summary = partition.summary
    assert summary.done == ()
    assert summary.memorized is not None
    assert (summary.accuracy_before, summary.accuracy_after) == (None, None)
    assert summary.advice.endswith("No callback acted on the partition.")


def test_advice_where_the_clean_samples_do_not_fill_a_batch():
    data = Unlike(Blobs(), batch_size=180, drop_last=True)
    partition, finetune = AttributionPartitionCallback(at_epoch=AT), CleanSubsetFinetuneCallback()
    with pytest.warns(UserWarning, match="do not fill one batch"):
        fit(Toy(mlp, memorizing), data, [partition, finetune], max_epochs=20)
    advice = partition.summary.advice
    assert "No callback acted on the partition." in advice
    assert "pay here" not in advice


def partition_of(suspects=2, **kwargs):
    drawn = make_partition(torch.where(torch.arange(10) < suspects, 0.1, 0.9), torch.arange(10) % 4)
    return replace(drawn, **kwargs)


def test_advice_counts_reasons():
    reason = torch.tensor([1, 1, 3, 2, 2, 2, 0, 0, 0, 0], dtype=torch.uint8)
    summary = summarize(
        partition_of(6, reason=reason, noise_rate=0.6), memorized=None, done=("did it",), accuracy=Accuracies()
    )
    assert summary.advice == (
        "6 of 10 training samples are suspect (2 for label, 3 for input, 1 for both), estimated noise rate 60.0%."
        " Done: did it. The effect is unknown: there are no validation data."
    )


GAIN = ": a gain over the weights at the partition. Continued training on all data was not compared."
NOTHING = ": no meaningful gain."
LOSS = ": a loss. Check the suspects before you use this model."


@pytest.mark.parametrize(
    ("best", "after", "ending"),
    [
        (None, 0.75, f"(+25.0 points){GAIN}"),
        (None, 0.504, f"(+0.4 points){GAIN}"),
        (None, 0.503, f"(+0.3 points){GAIN}"),
        (None, 0.502, f"(+0.2 points){NOTHING}"),
        (None, 0.5, f"(+0.0 points){NOTHING}"),
        (None, 0.499, f"(-0.1 points){NOTHING}"),
        (None, 0.497, f"(-0.3 points){LOSS}"),
        (None, 0.4, f"(-10.0 points){LOSS}"),
        (0.45, 0.75, f"(+25.0 points){GAIN}"),
        (0.6, 0.75, f"(+25.0 points), 0.600 at best before it (+15.0 points){GAIN}"),
        (0.75, 0.75, f"(+25.0 points), 0.750 at best before it (+0.0 points){NOTHING}"),
        (0.8, 0.75, f"(+25.0 points), 0.800 at best before it (-5.0 points){LOSS}"),
    ],
)
def test_advice_says_what_was_gained_and_against_what(best, after, ending):
    summary = summarize(partition_of(), memorized=0.8, done=("a", "b"), accuracy=Accuracies(0.5, after, best))
    text = f"Done: a; b. Validation accuracy {after:.3f} at the end, 0.500 at the partition {ending}"
    assert summary.advice.endswith(text)
    assert (summary.accuracy_before, summary.best_accuracy_before, summary.accuracy_after) == (0.5, best, after)


@pytest.mark.parametrize(
    ("samples", "after", "ending"),
    [
        (300, 0.943, ": no meaningful change, within the standard error of 1.2 points on 300 samples."),
        (300, 0.963, ": no meaningful change, within the standard error of 1.2 points on 300 samples."),
        (300, 0.954, NOTHING),
        (300, 0.933, LOSS),
        (300, 0.973, GAIN),
        (3000, 0.943, LOSS),
        (None, 0.943, LOSS),
    ],
)
def test_a_difference_within_the_standard_error_is_no_gain_and_no_loss(samples, after, ending):
    accuracy = Accuracies(0.9, after, 0.953, samples)
    summary = summarize(partition_of(), memorized=None, done=("a",), accuracy=accuracy)
    assert summary.advice.endswith(ending)
    assert summary.validation_samples == samples


def test_advice_where_the_partition_was_not_acted_upon():
    summary = summarize(partition_of(warning="it is not sure"), memorized=0.8, done=(), accuracy=Accuracies())
    assert summary.advice.endswith("Nothing was changed: it is not sure.")
    assert "memorized" not in summary.advice


def test_advice_of_a_dry_run_does_not_ask_whether_it_helped():
    summary = summarize(
        partition_of(), memorized=0.2, done=("would prune 1 of 8 neurons",), accuracy=Accuracies(), dry_run=True
    )
    assert "would prune 1 of 8 neurons" in summary.advice
    assert "nothing was changed" in summary.advice
    assert "Done" not in summary.advice
    assert "helped" not in summary.advice


class Halts(Exception):
    """As a full disk would."""


def test_there_is_no_summary_before_a_fit_has_ended():
    class Asks(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            with pytest.raises(
                RuntimeError, match="No summary yet: it is created at the end of a fit that has computed a partition"
            ):
                partition.summary  # noqa: B018
            if trainer.current_epoch == stop:
                raise Halts

    partition, stop = AttributionPartitionCallback(at_epoch=1), None
    fit(Toy(), BlobsData(Blobs(101)), [partition, Asks()], max_epochs=3)
    assert partition.summary.samples == 101
    # A new fit forgets the old one's, also where it does not end.
    stop = 2
    with pytest.raises(Halts):
        fit(Toy(), BlobsData(Blobs(101)), [partition, Asks()], max_epochs=4)
    with pytest.raises(RuntimeError, match="No summary yet"):
        partition.summary  # noqa: B018


def test_before_the_fit_has_ended_there_is_no_summary_and_after_a_short_one_there_is():
    partition = AttributionPartitionCallback(at_epoch=3)
    with pytest.raises(RuntimeError, match="No summary yet"):
        partition.summary  # noqa: B018
    fit(Toy(), BlobsData(Blobs(101)), [partition], max_epochs=9, max_steps=8)
    assert partition.summary.samples == 101
    assert partition.summary.done == ()
