"""A fit on more classes than have coordinates: wrong labels are found, on clean data nothing is."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn import AttributionPartitionCallback, DataFormat
from lightning_unlearn.evidence.early_epochs import EarlyEpochs
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks
from tests.toys import make_trainer

CLASSES, EACH = 200, 30


class Probe(L.LightningModule):
    """A linear head on what stands for frozen features, with as many outputs as asked for."""

    def __init__(self, outputs=CLASSES):
        super().__init__()
        self.head = nn.Linear(32, outputs)

    def forward(self, x):
        return self.head(x)

    def training_step(self, batch, _):
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def birds(rate=0.0):
    """Gaussian classes, and a share of labels that may name any class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(CLASSES).repeat_interleave(EACH)
    x = torch.randn(CLASSES, 32, generator=generator)[y] + 0.45 * torch.randn(len(y), 32, generator=generator)
    wrong = torch.rand(len(y), generator=generator) < rate
    other = (y + torch.randint(1, CLASSES, (len(y),), generator=generator)) % CLASSES
    return x, torch.where(wrong, other, y), wrong, y


def judged(x, label, epochs=4, *, outputs=CLASSES, saves=(), resumed=None, recipe="label"):
    L.seed_everything(0, verbose=False)
    callback = AttributionPartitionCallback(at_epoch=epochs, dry_run=True, recipe=recipe)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback, *saves],
        logger=False,
        enable_checkpointing=bool(saves),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Probe(outputs), DataLoader(TensorDataset(x, label), 64, shuffle=True), ckpt_path=resumed)
    return callback


@pytest.mark.parametrize("outputs", [CLASSES, 1000], ids=["as many outputs", "a thousand outputs"])
def test_wrong_labels_among_two_hundred_classes_are_found(outputs):
    x, label, wrong, true = birds(0.05)
    partition = judged(x, label, outputs=outputs).partition
    flagged = ~partition.is_clean
    assert wrong[flagged].float().mean() > 0.85
    assert (wrong & flagged).sum() > 0.7 * wrong.sum()
    assert partition.noise_rate_interval[0] <= wrong.float().mean()
    assert partition.suggested_label[wrong & flagged].eq(true[wrong & flagged]).float().mean() > 0.8
    assert partition.is_actionable


@pytest.mark.parametrize("epochs", [2, 4])
def test_clean_labels_of_two_hundred_classes_are_left_alone(epochs):
    x, label, _, _ = birds()
    with pytest.warns(UserWarning, match="Partition not applied"):
        assert judged(x, label, epochs).partition.is_clean.all()


def test_a_fit_of_many_classes_that_goes_on_gives_what_one_in_one_piece_gives(tmp_path):
    x, label, _, _ = birds(0.05)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = judged(x, label, saves=[save])
    resumed = judged(x, label, resumed=tmp_path / "epoch=2.ckpt")
    assert whole.state_dict()["early"]["is_settled"]
    assert resumed.state_dict()["early"] == whole.state_dict()["early"]
    found, expected = (each.partition.suspect_indices() for each in (resumed, whole))
    assert torch.isin(found, expected).float().mean() > 0.9


def test_a_checkpoint_of_random_coordinates_ends_a_fit_and_leaves_validation_alone(tmp_path):
    x, label, _, _ = birds(0.05)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    judged(x, label, saves=[save])
    file = tmp_path / "epoch=1.ckpt"
    checkpoint = torch.load(file, weights_only=False)
    (state,) = [of for name, of in checkpoint["callbacks"].items() if "Attribution" in name]
    state["trajectory"]["phases"] = torch.zeros(4, len(label), 129)
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match="separates 200 classes, but it was written by a version of lightning_unlearn"):
        judged(x, label, resumed=file)
    callback = AttributionPartitionCallback(at_epoch=4, dry_run=True)
    with pytest.warns(UserWarning, match="Weights are not affected"):
        callback.load_state_dict(state)


def by_attribution(evidence):
    assert evidence.attribution.shape[2] == 128
    assert evidence.soft_margins.shape[2] == 9
    return evidence.label_confidence


def test_a_recipe_of_a_user_has_attributions_of_many_classes():
    x, label, wrong, _ = birds(0.05)
    probability = judged(x, label, recipe=by_attribution).partition.clean_probability
    assert probability[wrong].mean() < probability[~wrong].mean() - 0.3


def epoch_of(rank, world_size, outputs=CLASSES):
    """An epoch of a network that has learned, as a rank has seen it."""
    _, label, _, true = birds(0.05)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(label), outputs, generator=generator)
    logits[torch.arange(len(label)), true] += 5
    position = (1 + 255 * torch.rand(len(label), generator=generator)).clamp(max=255).to(torch.uint8)
    rows = torch.arange(rank, len(label), world_size)
    trajectory, positions = TrainingDynamics(len(label), outputs), torch.zeros(len(label), dtype=torch.uint8)
    trajectory.observe(rows, logits[rows], label[rows])
    positions[rows] = position[rows]
    return trajectory, positions, rows


def test_an_early_epoch_of_many_classes_is_the_same_for_any_ranks():
    def look(rank, reduce, world_size=2):
        early, (trajectory, positions, rows) = EarlyEpochs(), epoch_of(rank, world_size)
        early.look(trajectory, positions, 50, (rows, torch.ones(len(rows))), torch.device("cpu"), reduce)
        return early

    one = look(0, no_reduce, 1)
    assert one.rate.is_settled
    assert one.rate.low <= 0.05 <= one.rate.high < 0.07
    for found in run_ranks(look, 2):
        assert found.rate.middle == pytest.approx(one.rate.middle, rel=1e-3)
        assert found.drawn.equal(one.drawn)
    assert EarlyEpochs.from_state_dict(one.state_dict()).state_dict() == one.state_dict()


def test_an_epoch_in_which_most_outputs_were_no_class_is_not_looked_at():
    trajectory, positions, rows = epoch_of(0, 1, outputs=1000)
    early = EarlyEpochs()
    early.look(trajectory, positions, 50, (rows, torch.ones(len(rows))), torch.device("cpu"), no_reduce)
    assert early.rate is None


@pytest.mark.parametrize("outputs", [CLASSES, 1000], ids=["as many outputs", "a thousand outputs"])
def test_wrong_labels_among_two_hundred_classes_of_a_stream_are_found(outputs):
    x, label, wrong, true = birds(0.05)
    L.seed_everything(0, verbose=False)
    data = DataFormat(sample_key=lambda batch: batch[2], batch_to_xy=lambda batch: (batch[0], batch[1]))
    callback = AttributionPartitionCallback(at_epoch=4, recipe="label", data=data)
    loader = DataLoader(TensorDataset(x, label, torch.arange(len(x))), 64, shuffle=True)
    make_trainer([callback], max_epochs=4).fit(Probe(outputs), loader)
    partition = callback.partition
    assert partition.keys == tuple(range(len(x)))
    flagged = ~partition.is_clean
    assert wrong[flagged].float().mean() > 0.85
    assert (wrong & flagged).sum() > 0.7 * wrong.sum()
    assert partition.suggested_label[wrong & flagged].eq(true[wrong & flagged]).float().mean() > 0.8
