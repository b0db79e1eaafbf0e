"""Leave-one-out scores of features that training has not changed: where they are used, and where not."""

import logging
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_unlearn import AttributionPartitionCallback
from lightning_unlearn.evidence import frozen_features as frozen_features_module
from lightning_unlearn.evidence.frozen_features import FrozenFeatures
from lightning_unlearn.functional.leave_one_out import leave_one_out_logits, left_out_rate
from lightning_unlearn.recipes import Recipe, RecipeResult
from lightning_unlearn.recipes.evidence import OutOfSample
from lightning_unlearn.utilities.reduce import no_reduce
from tests.toys import Blobs, BlobsData, Toy, convnet, fit, mlp, sgd, weights

SIZE, AT = 400, 2
USED = "tells how many are wrong"


def rate_of(features, label):
    weight = torch.ones(len(label))
    return left_out_rate(leave_one_out_logits(features, label, weight, 4), label, weight)


class Sees:
    """A recipe that keeps its evidence."""

    def __call__(self, evidence, _):
        self.evidence = evidence
        return RecipeResult(torch.full_like(evidence.margin, 0.9), evidence.prediction)


class Frozen(Toy):
    """A backbone with a batch norm whose statistics go on, and a head."""

    def __init__(self, optimizer=sgd, requires_grad=False):
        super().__init__(lambda: nn.Linear(64, 4), optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.backbone = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.backbone.requires_grad_(requires_grad)

    def forward(self, x):
        return self.net(self.backbone(x))


def head_only(module):
    return torch.optim.SGD(module.net.parameters(), lr=0.05)


def seen(module, data=None, callbacks=(), **kwargs):
    """What the recipe was told of labels that were not learned, and the callback."""
    sees = Sees()
    ours = AttributionPartitionCallback(
        at_epoch=AT, dry_run=True, recipe=Recipe("sees", sees, needs_out_of_sample=True)
    )
    data = BlobsData(Blobs(SIZE), by_epoch=True) if data is None else data
    fit(module, data, [ours, *callbacks], max_epochs=AT, **kwargs)
    return sees.evidence, ours


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    return lambda: " ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "make", [Frozen, lambda: Frozen(head_only, requires_grad=True)], ids=["no gradient", "not in the optimizer"]
)
def test_a_frozen_backbone_tells_the_rate(make, said):
    data, module = Blobs(SIZE), make()
    evidence, _ = seen(module, BlobsData(data, by_epoch=True))
    module.eval()
    with torch.no_grad():
        expected = rate_of(module.backbone(data.x), data.y)
    found = evidence.out_of_sample.left_out
    with torch.no_grad():
        logits = leave_one_out_logits(module.backbone(data.x), data.y, torch.ones(SIZE), 4)
    logits = (logits - logits.mean(dim=1, keepdim=True)).float()
    torch.testing.assert_close(evidence.left_out @ evidence.basis.T, logits, atol=1e-2, rtol=1e-2)
    assert found.middle == pytest.approx(expected.middle, rel=1e-3)
    assert found.z_score == pytest.approx(expected.z_score, rel=1e-3)
    assert found.low <= data.wrong.float().mean() <= found.high
    assert "Training has not changed the input of 'net': ridge regression on it predicts" in said()
    assert USED in said()


def test_a_network_that_is_trained_from_its_first_layer_on_has_its_inputs_left(said):
    evidence, _ = seen(Toy())
    assert evidence.out_of_sample.left_out.low <= 0.25 <= evidence.out_of_sample.left_out.high
    assert "the input of 'net.0'" in said()


def test_images_are_no_features(said):
    evidence, _ = seen(Toy(convnet), BlobsData(Blobs(SIZE, image=True)))
    assert evidence.out_of_sample.left_out is None
    assert "ridge" not in said()


class Thaws(BackboneFinetuning):
    """Trains the backbone in the second epoch."""

    def __init__(self):
        super().__init__(unfreeze_backbone_at_epoch=1, verbose=False)


def test_a_backbone_that_was_trained_in_between_is_not_taken(said):
    evidence, _ = seen(Frozen(head_only), callbacks=[Thaws()])
    assert evidence.out_of_sample.left_out is None
    assert "scores of the input of 'net' are not used: it has changed since" in said()


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_fit_that_goes_on_is_told_the_same(tmp_path, epoch, said):
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole, _ = seen(Frozen(), callbacks=[save], enable_checkpointing=True)
    resumed, _ = seen(Frozen(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert resumed.out_of_sample.left_out.middle == pytest.approx(whole.out_of_sample.left_out.middle, rel=1e-6)
    assert said().count(USED) == 2


class Augmented(Blobs):
    """Noise from a random state that no seed of the fit sets."""

    generator = torch.Generator().manual_seed(0)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(16, generator=self.generator), self.y[index]


def test_a_fit_that_goes_on_with_samples_augmented_at_random_says_that_it_cannot_tell(tmp_path, said):
    def data():
        return BlobsData(Augmented(SIZE), by_epoch=True)

    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole, _ = seen(Frozen(), data(), [save], enable_checkpointing=True)
    resumed, _ = seen(Frozen(), data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert whole.out_of_sample.left_out is not None
    assert resumed.out_of_sample.left_out is None
    assert "scores of the input of 'net' are not used: after this checkpoint it cannot be verified" in said()


def test_a_checkpoint_without_the_features_goes_on_without_them(tmp_path):
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    seen(Frozen(), callbacks=[save], enable_checkpointing=True)
    path = tmp_path / "epoch=0.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    for state in checkpoint["callbacks"].values():
        state.pop("features", None)
    torch.save(checkpoint, path)
    resumed, _ = seen(Frozen(), ckpt_path=path)
    assert resumed.out_of_sample.left_out is None


def test_the_fit_is_left_as_it_was():
    with_, without = Frozen(), Frozen()
    seen(with_)
    fit(without, BlobsData(Blobs(SIZE), by_epoch=True), max_epochs=AT)
    for name, value in weights(without).items():
        torch.testing.assert_close(weights(with_)[name], value, rtol=0, atol=0)


class Knows(Frozen):
    """A backbone that has learned the training labels by heart in an earlier fit."""

    def __init__(self, data):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
            head, x, y = nn.Linear(64, 4), data.x, data.y
            optimizer = torch.optim.Adam([*self.backbone.parameters(), *head.parameters()], lr=3e-3)
            for _ in range(400):
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(self.backbone(x)), y).backward()
                optimizer.step()
        self.backbone.requires_grad_(False)


class Validates(BlobsData):
    def val_dataloader(self):
        return DataLoader(Blobs(400, 0.25, seed=7), batch_size=16)


def test_features_that_have_seen_the_labels_before_are_refused(said):
    data = Blobs(SIZE)
    evidence, _ = seen(Knows(data), Validates(data, by_epoch=True))
    assert evidence.out_of_sample.left_out is None
    assert (
        "they predict more than the network does on validation samples, so the features have seen the labels" in said()
    )
    honest, _ = seen(Frozen(), Validates(data, by_epoch=True))
    assert honest.out_of_sample.left_out is not None


def test_of_many_samples_some_are_taken(monkeypatch, said):
    monkeypatch.setattr(frozen_features_module, "MOST_NUMBERS", SIZE * 64 // 3)
    data, module = Blobs(SIZE), Frozen()
    evidence, _ = seen(module, BlobsData(data, by_epoch=True))
    assert evidence.left_out is None
    module.eval()
    some = slice(None, None, 4)
    with torch.no_grad():
        expected = rate_of(module.backbone(data.x)[some], data.y[some])
    assert evidence.out_of_sample.left_out.middle == pytest.approx(expected.middle, rel=1e-3)


@pytest.mark.parametrize("batch", [1, 5, 7, 16])
@pytest.mark.parametrize("every", [1, 3, 8])
def test_every_third_sample_is_every_third_across_batches(batch, every):
    features, x = FrozenFeatures(), torch.arange(50.0).unsqueeze(1)
    features._every = every
    for part in x.split(batch):
        features.take(part)
    assert torch.cat(features._parts).equal(x[::every])


def test_samples_that_are_not_finite_do_not_count():
    evidence, _ = seen(Frozen())
    data = Blobs(SIZE)
    broken = data.x.clone()
    broken[:10] = torch.nan
    rates = []
    for x, weight in ((broken, torch.ones(SIZE)), (data.x, (torch.arange(SIZE) >= 10).float())):
        features = FrozenFeatures()
        features.take(x)
        bare = replace(evidence, weight=weight, out_of_sample=OutOfSample(), left_out=None)
        rates.append(features.added_to(bare, no_reduce).out_of_sample.left_out.middle)
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)


def test_more_features_than_are_looked_at(monkeypatch, said):
    monkeypatch.setattr(frozen_features_module, "MOST_FEATURES", 63)
    evidence, _ = seen(Frozen())
    assert evidence.out_of_sample.left_out is None


def test_recipes_that_do_not_ask_cost_nothing(monkeypatch):
    monkeypatch.setattr(FrozenFeatures, "start", lambda *_: 1 / 0)
    callback = AttributionPartitionCallback(
        at_epoch=AT, dry_run=True, recipe=lambda evidence: evidence.label_confidence
    )
    fit(Toy(mlp), BlobsData(Blobs(60)), [callback], max_epochs=AT)
    assert len(callback.partition) == 60
