"""Label errors that are few, by default: found in a fit, with what to expect of them, and nothing on clean data."""

import csv
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn import Partition, UnlearnReport
from lightning_unlearn.evidence.early_epochs import EarlyEpochs, held_by_class
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.functional.prequential import PrequentialRate
from lightning_unlearn.partitioning import messages as messages_module
from lightning_unlearn.partitioning.build import TRAINED_ON
from lightning_unlearn.partitioning.caveat import caveat_of
from lightning_unlearn.recipes.base import NoiseEstimate
from lightning_unlearn.results.finding import finding_of
from lightning_unlearn.utilities.files import write_csv
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks
from tests.toys import partition_callback

CLASSES = 10


class Probe(L.LightningModule):
    """A linear head on what stands for frozen features."""

    def __init__(self, lr):
        super().__init__()
        self.head, self.lr = nn.Linear(64, CLASSES), lr

    def forward(self, x):
        return self.head(x)

    def training_step(self, batch, _):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def digits(rate=0.0, step=None):
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=generator) < rate
    moved = torch.randint(1, CLASSES, (len(y),), generator=generator) if step is None else step
    return (x / 16).float(), torch.where(wrong, (y + moved) % CLASSES, y).long(), wrong


def judged(x, label, epochs, *, lr=3e-3, saves=(), resumed=None, data=None, of=Probe, **settings):
    L.seed_everything(0, verbose=False)
    callback = partition_callback(at_epoch=epochs, dry_run=True, **settings)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback, *saves],
        logger=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in saves),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(of(lr), DataLoader(data or TensorDataset(x, label), 64, shuffle=True), ckpt_path=resumed)
    return callback


def pairs(noise, n=5000):
    """Pairs of classes that are hard to tell: the gate stays shut, whatever is wrong."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (n,), generator=generator)
    centers = torch.randn(CLASSES, 64, generator=generator)
    centers[1::2] = 0.45 * centers[1::2] + 0.9 * centers[0::2]
    x = 0.35 * centers[y] + torch.randn(n, 64, generator=generator)
    wrong = torch.rand(n, generator=generator) < noise
    other = (y + torch.randint(1, CLASSES, (n,), generator=generator)) % CLASSES
    return x, torch.where(wrong, other, y), wrong


def test_a_few_errors_among_classes_that_are_hard_to_tell():
    x, label, wrong = pairs(0.05)
    callback = judged(x, label, 8, lr=1e-3)
    partition = callback.partition
    flagged = ~partition.is_clean
    assert flagged.sum() >= 40
    assert wrong[flagged].float().mean() >= 0.8
    assert partition.expected_precision >= 0.85
    low, high = partition.noise_rate_interval
    assert low <= partition.noise_rate <= high < 1
    assert partition.is_actionable
    said = (
        f"about 9 in 10 expected to be wrong, estimated noise rate {partition.noise_rate:.1%} ({low:.1%} to {high:.1%})"
    )
    assert f"{said}; the next {partition.worth_review():,} are worth a look." in callback.summary.advice
    assert Partition.from_state_dict(partition.state_dict()).noise_rate_interval == (low, high)
    doubtful = partition.doubtful
    assert doubtful.equal(partition.is_clean & (partition.clean_probability < TRAINED_ON))
    assert wrong[flagged].float().mean() > wrong[doubtful].float().mean() >= 0.4
    assert Partition.from_state_dict(partition.state_dict()).doubtful.equal(doubtful)
    kept = judged(x, label, 8, lr=1e-3, min_class_fraction=0.97).partition
    for c in range(CLASSES):
        members = label == c
        assert kept.trained_on()[members].float().mean() >= 0.97
    assert 0 < kept.doubtful.sum() < doubtful.sum()


@pytest.mark.parametrize("epochs", [2, 5, 10])
def test_nothing_is_acted_upon_on_clean_data(epochs):
    x, label, _ = digits()
    with pytest.warns(UserWarning, match="Partition not applied"):
        partition = judged(x, label, epochs).partition
    assert partition.is_clean.all()
    assert not partition.doubtful.any()
    assert not partition.is_actionable


class HardestOnly(Probe):
    """Trains on the eighth of each batch that it does worst on."""

    def __init__(self, lr):
        super().__init__(lr)
        self.head = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))

    def training_step(self, batch, _):
        loss = functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return loss.topk(max(1, len(loss) // 8)).values.mean()


def test_a_network_that_is_trained_on_hard_samples_confuses_classes_whatever_their_labels():
    generator = torch.Generator().manual_seed(0)
    y = torch.multinomial(20 ** (-torch.arange(CLASSES) / 9), 3000, replacement=True, generator=generator)
    x = 0.4 * torch.randn(CLASSES, 64, generator=generator)[y] + torch.randn(3000, 64, generator=generator)
    wrong = torch.rand(3000, generator=generator) < 0.1
    label = torch.where(wrong, (y + torch.randint(1, CLASSES, (3000,), generator=generator)) % CLASSES, y)
    partition = judged(x, label, 4, lr=1e-3, of=HardestOnly).partition
    suspect = ~partition.is_clean
    assert suspect.sum() > 50
    assert wrong[suspect].float().mean() >= partition.expected_precision - 0.1
    assert partition.noise_rate_interval[0] <= wrong.float().mean() <= partition.noise_rate_interval[1]


def test_next_class_by_its_name():
    x, label, wrong = digits(0.2, step=1)
    partition = judged(x, label, 5).partition
    flagged = ~partition.is_clean
    assert wrong[flagged].float().mean() >= 0.7
    assert (wrong & flagged).sum() >= 0.6 * wrong.sum()


@pytest.mark.parametrize("epochs", [4, 5])
def test_pairs_of_classes_that_are_hard_to_tell_do_not_go_by_each_others_names(epochs):
    x, label, _ = pairs(0)
    with pytest.warns(UserWarning, match="Partition not applied"):
        assert judged(x, label, epochs, lr=1e-3).partition.is_clean.all()


def halves(total, num_classes):
    """An epoch as one rank has seen it, and as two have."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(total) % num_classes
    logits = 2 * functional.one_hot(label, num_classes) + torch.randn(total, num_classes, generator=generator)
    other = (label + torch.randint(1, num_classes, (total,), generator=generator)) % num_classes
    given = torch.where(torch.rand(total, generator=generator) < 0.1, other, label)
    position = (1 + 255 * torch.rand(total, generator=generator)).clamp(max=255).to(torch.uint8)
    ranks = []
    for rows in (torch.arange(total), torch.arange(0, total, 2), torch.arange(1, total, 2)):
        trajectory, positions = TrainingDynamics(total, num_classes), torch.zeros(total, dtype=torch.uint8)
        trajectory.observe(rows, logits[rows], given[rows])
        positions[rows] = position[rows]
        ranks.append((trajectory, positions))
    return ranks


def test_an_early_epoch_of_two_ranks_is_that_of_one():
    whole, *parts = halves(2000, 4)
    one = EarlyEpochs()
    share = (torch.arange(2000), torch.ones(2000))
    one.look(*whole, 50, share, torch.device("cpu"), no_reduce)
    assert one.rate.is_settled
    assert one.rate.low <= 0.1 <= one.rate.high

    def look(rank, reduce):
        early, index = EarlyEpochs(), torch.arange(rank, 2000, 2)
        early.look(*parts[rank], 50, (index, torch.ones(1000)), torch.device("cpu"), reduce)
        return early

    for early in run_ranks(look, 2):
        for name in ("low", "middle", "high", "z_score", "skill"):
            assert getattr(early.rate, name) == pytest.approx(getattr(one.rate, name), rel=1e-3, abs=1e-4)
        assert early.drawn.equal(one.drawn)


def test_an_epoch_that_was_resumed_in_the_middle_is_not_looked_at():
    (trajectory, positions), *_ = halves(400, 4)
    early = EarlyEpochs()
    positions[positions < 100] = 0
    early.look(trajectory, positions, 50, (torch.arange(400), torch.ones(400)), torch.device("cpu"), no_reduce)
    assert early.rate is None


def test_how_many_samples_a_class_has_is_told_by_what_is_drawn_twice():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(8000).remainder(20).clamp(max=2)  # 400, 400, 7,200
    drawn = torch.multinomial((1 / torch.bincount(label))[label], 8000, replacement=True, generator=generator)
    draws = torch.bincount(drawn, minlength=8000)
    seen, of_class = (torch.zeros(3, dtype=torch.float64).index_add_(0, label, x.double()) for x in (draws > 0, draws))
    expected = torch.tensor([400.0, 400, 7200]).double()
    torch.testing.assert_close(held_by_class(seen, of_class), expected, rtol=0.1, atol=0)
    once = torch.tensor([5.0, 7.0]).double()
    assert torch.equal(held_by_class(once, once), once)


def test_what_an_early_epoch_told_survives_a_checkpoint():
    early = EarlyEpochs()
    assert EarlyEpochs.from_state_dict(early.state_dict()).rate is None
    early.rate = PrequentialRate(0.01, 0.02, 0.03, 4.0, 0.8, True, torch.tensor([0.1, -0.1], dtype=torch.float64))
    early.drawn = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = EarlyEpochs.from_state_dict(early.state_dict())
    assert found.state_dict() == early.state_dict()
    assert found.is_due(2)
    found.rate = replace(found.rate, is_confirmed=True)
    assert not EarlyEpochs.from_state_dict(found.state_dict()).is_due(2)
    assert EarlyEpochs().is_due(6)
    assert not EarlyEpochs().is_due(7)


def test_a_fit_that_goes_on_has_what_an_early_epoch_told(tmp_path):
    x, label, _ = digits(0.1)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = judged(x, label, 5, saves=[save]).state_dict()["early"]
    assert whole["is_settled"]
    resumed = judged(x, label, 5, resumed=tmp_path / "epoch=3.ckpt")
    assert resumed.state_dict()["early"] == whole


ESTIMATE = NoiseEstimate("weak", 0.03, (0.019, 0.044), 3.4)


@pytest.mark.parametrize(
    ("changes", "worth", "said"),
    [
        (
            {"names": ((3, 5, 0.23),)},
            212,
            "212 labels are worth a look, but no early epoch shows whether classes are mislabeled or hard to"
            " separate: listed for review, not acted upon",
        ),
        (
            {},
            212,
            "212 labels are worth a look, but the evidence is too weak to act on (z = 3.4): listed for review, not"
            " acted upon",
        ),
        (
            {},
            0,
            "labels may be wrong, but the evidence is too weak to act on (z = 3.4): listed for review, not acted upon",
        ),
        (
            {"sampled": True},
            212,
            "212 labels are worth a look, but the sampler draws some classes more often, and their samples are"
            " memorized first: listed for review, not acted upon",
        ),
        (
            {"status": "found"},
            3,
            "about 3.0% of the labels (1.9% to 4.4%) look wrong, but no list reaches suspect_precision",
        ),
    ],
)
def test_what_may_be_wrong_though_nothing_is_suspect(changes, worth, said):
    assert caveat_of(replace(ESTIMATE, **changes), worth) == said


def test_no_sign_is_no_promise_that_few_labels_are_wrong():
    assert "%" not in caveat_of(replace(ESTIMATE, status="none"), 0)


@pytest.mark.parametrize("named", ["data set", "report", "nobody"])
def test_the_log_names_the_classes(monkeypatch, tmp_path, named):
    x, label, _ = digits(0.2, step=1)
    data, told = TensorDataset(x, label), []
    names = [f"number {k}" for k in range(CLASSES)]
    if named == "data set":
        data.classes = names
    reports = [UnlearnReport(tmp_path, class_names=names)] if named == "report" else []
    monkeypatch.setattr(messages_module, "finding_of", lambda partition: told.append(partition.class_names) or "all")
    judged(x, label, 2, saves=reports, data=data)
    assert told == [() if named == "nobody" else tuple(names)]


def test_the_log_begins_with_both_lists(caplog):
    x, label, _ = pairs(0.05)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        partition = judged(x, label, 8, lr=1e-3).partition
    (first,) = (one for one in caplog.messages if one.startswith("Partition after"))
    assert first.endswith(f": {finding_of(partition)}.")
    assert (
        f"look wrong; {len(partition.suspect_indices()):,} suspects, about 9 in 10 expected to be wrong; the" in first
    )
    assert f"the next {partition.worth_review():,} are worth a look" in first


def test_a_person_s_decisions_move_the_rate_and_its_interval(tmp_path):
    x, label, _ = pairs(0.05)
    before = judged(x, label, 8, lr=1e-3).partition
    table, kept = tmp_path / "suspects.csv", before.suspect_indices()[:50]
    dropped = before.review_ranking()[:20]
    before.to_csv(table, review=20)
    rows = list(csv.DictReader(table.open(encoding="utf-8-sig")))
    assert [int(row["index"]) for row in rows] == before.ranking()[: len(rows)].tolist()
    for row in [*rows[:50], *rows[-20:]]:
        row["decision"] = "drop" if row["list"] != "suspect" else "keep"
    write_csv(table, {title: [row[title] for row in rows] for title in rows[0]})
    after = judged(x, label, 8, lr=1e-3, review=table).partition
    assert after.is_clean[kept].all()
    assert not after.is_clean[dropped].any()
    decided = before.clean_probability.double()
    moved = (decided[dropped].sum() - (1 - decided[kept]).sum()).item() / len(before)
    assert after.noise_rate == pytest.approx(before.noise_rate + moved, abs=1e-4)
    low, high = (end + moved for end in before.noise_rate_interval)
    assert after.noise_rate_interval == pytest.approx((max(low, 0), high), abs=1e-4)
