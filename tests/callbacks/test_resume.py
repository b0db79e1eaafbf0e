import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

from lightning_unlearn import DataFormat
from lightning_unlearn.data.fingerprint import fingerprint
from tests.toys import (
    Blobs,
    IndexRecorder,
    Toy,
    adamw,
    assert_same_weights,
    fit,
    mlp,
    sgd,
    weights,
)
from tests.toys import (
    QuickData as BlobsData,
)
from tests.toys import (
    quick_trio as trio,
)

EPOCHS, AT = 6, 3


def halving(optimizer):
    return LambdaLR(optimizer, lambda epoch: 0.5**epoch)


def half_rate_in_the_middle(module):
    """A closure over the remaining steps, which the optimizer's state does not hold."""
    optimizer = adamw(module)
    total = int(module.trainer.estimated_stepping_batches)
    schedule = LambdaLR(optimizer, lambda step: 1.0 if step < total / 2 else 0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


VARIANTS = {
    "full": {},
    "full, lr": {"lr": 0.01},
    "shrunk": {"warm_start": "shrink"},
    "from the start, layers": {"warm_start": "start", "mode": "layers", "lr": 0.01},
    "layers": {"mode": "layers"},
    "layers, lr": {"mode": "layers", "lr": 0.01},
    "layers, optimizer": {"mode": "layers", "optimizer": lambda p: torch.optim.Adam(p, 0.01), "lr_scheduler": halving},
}


# A schedule of the user's where it goes on, and all the epochs where what is resumed differs early on.
PAIRS = [
    *((variant, sgd) for variant in VARIANTS),
    *((v, half_rate_in_the_middle) for v in ("full", "shrunk", "layers")),
]
FROM_THE_FIRST = ("full", "from the start, layers")


@pytest.mark.parametrize(("variant", "optimizer"), PAIRS)
def test_resuming_after_any_epoch_equals_the_uninterrupted_fit(tmp_path, variant, optimizer):
    # The default keeps more of what it has seen than others.
    recipe = {"recipe": "auto"} if variant == "full" else {}

    def start(ckpt_path=None, callbacks=()):
        data = BlobsData(Blobs(101), by_epoch=True)
        ours = trio(AT, finetune=VARIANTS[variant], **recipe)
        module, record = Toy(optimizer=optimizer), IndexRecorder(data.train)
        trainer = fit(
            module,
            data,
            [*ours, record, *callbacks],
            ckpt_path=ckpt_path,
            max_epochs=EPOCHS,
            enable_checkpointing=bool(callbacks),
        )
        return ours, module, record, trainer

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    (partition, prune, _), whole, record, trainer = start(callbacks=[keep])
    assert sorted(record.by_epoch[AT]) == partition.partition.clean_indices().tolist()
    # Before any evidence, between the passes, right before the partition is computed, and twice after it.
    for epoch in range(0 if variant in FROM_THE_FIRST else AT - 1, EPOCHS - 1):
        ours, module, again, trainer_again = start(tmp_path / f"epoch={epoch}.ckpt")
        assert ours[0].partition.is_clean.equal(partition.partition.is_clean), epoch
        for name in ("clean_probability", "label_evidence", "suggested_label", "label"):
            torch.testing.assert_close(getattr(ours[0].partition, name), getattr(partition.partition, name), msg=name)
        assert ours[0].partition.epoch == AT
        assert ours[1].mask.keep.equal(prune.mask.keep)
        assert ours[1].target_layer() == prune.target_layer()
        assert again.by_epoch == {e: record.by_epoch[e] for e in range(epoch + 1, EPOCHS)}, epoch
        assert_same_weights(weights(module), weights(whole), 1e-6)
        assert trainer_again.optimizers[0].param_groups[0]["lr"] == trainer.optimizers[0].param_groups[0]["lr"]
        assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("when", ["validation", "last batch"])
def test_resuming_from_other_ends_of_an_epoch(tmp_path, when):
    kwargs = {"save_on_train_epoch_end": False} if when == "validation" else {"every_n_train_steps": 1}
    final = []
    keep = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, **kwargs)
    for ckpt_path in (None, *range(2, 4)):
        callbacks = trio(AT, finetune={"mode": "layers", "lr": 0.01}, recipe="auto")
        if ckpt_path is not None:
            path = max(tmp_path.glob(f"epoch={ckpt_path}-step=*.ckpt"), key=lambda p: int(p.stem.rpartition("=")[2]))
        module = Toy()
        fit(
            module,
            BlobsData(Blobs(101), by_epoch=True),
            [*callbacks] if ckpt_path is not None else [*callbacks, keep],
            ckpt_path=None if ckpt_path is None else path,
            max_epochs=EPOCHS,
            enable_checkpointing=ckpt_path is None,
        )
        final.append(weights(module))
    for other in final[1:]:
        assert_same_weights(other, final[0], 1e-6)


class Workers(BlobsData):
    def train_dataloader(self):
        sampler = DistributedSampler(self.train, num_replicas=1, rank=0, seed=1)
        return DataLoader(self.train, batch_size=16, sampler=sampler, num_workers=1)


def test_the_clean_subset_is_drawn_in_the_same_order_with_workers(tmp_path):
    data = Workers(Blobs(101))
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    record, again = IndexRecorder(data.train), IndexRecorder(data.train)
    fit(Toy(), data, [*trio(1), record, keep], max_epochs=4, enable_checkpointing=True)
    fit(Toy(), Workers(data.train), [*trio(1), again], max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.by_epoch == {epoch: record.by_epoch[epoch] for epoch in (2, 3)}


def test_a_validation_interval_longer_than_the_subset_survives(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(Toy(), BlobsData(Blobs(101)), [*trio(3), keep], enable_checkpointing=True, val_check_interval=4, max_epochs=5)
    module, callbacks = Toy(), trio(3)
    with pytest.warns(UserWarning, match="fewer than val_check_interval=4"):
        fit(
            module,
            BlobsData(Blobs(101)),
            callbacks,
            val_check_interval=4,
            max_epochs=6,
            ckpt_path=tmp_path / "epoch=3.ckpt",
        )
    assert module.steps_by_epoch == dict.fromkeys((4, 5), -(-len(callbacks[0].partition.clean_indices()) // 32))
    assert module.validations_by_epoch == {4: 1, 5: 1}


@pytest.fixture
def checkpoints(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(Toy(), BlobsData(Blobs(101)), [*trio(2), keep], enable_checkpointing=True)
    return tmp_path


@pytest.mark.parametrize("epoch", [1, 2], ids=["between the passes", "after the swap"])
@pytest.mark.parametrize("size", [90, 110])
def test_another_number_of_samples_is_refused(checkpoints, epoch, size):
    module = Toy()
    with pytest.raises(ValueError, match=f"Expected the 101 training samples .*, but the dataset now has {size}"):
        fit(module, BlobsData(Blobs(size)), trio(2), ckpt_path=checkpoints / f"epoch={epoch}.ckpt")
    assert module.steps == 0
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_new_fit_with_the_same_callbacks_starts_anew():
    callbacks = trio(3, finetune={"mode": "layers", "lr": 0.01})
    first, partitions, masks = [], [], []
    for seed in (0, 1, 0):
        module = Toy(lambda: mlp(0.2))
        fit(module, BlobsData(Blobs(101, seed=seed)), callbacks)
        assert module.steps_by_epoch[0] == 4
        assert module.steps_by_epoch[3] < 4
        first.append(weights(module))
        partitions.append(callbacks[0].partition)
        masks.append(callbacks[1].mask)
    assert_same_weights(first[0], first[2])
    assert not partitions[0].clean_probability.equal(partitions[1].clean_probability)
    assert partitions[0].clean_probability.equal(partitions[2].clean_probability)
    assert masks[0].sensitivity.equal(masks[2].sensitivity)


def test_the_same_trainer_goes_on_where_it_stopped():
    data, callbacks = BlobsData(Blobs(101)), trio(2, finetune={"mode": "layers"})
    module, record = Toy(), IndexRecorder(data.train)
    trainer = fit(module, data, [*callbacks, record])
    drawn = callbacks[0].partition
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, datamodule=data)
    assert callbacks[0].partition is drawn
    assert sorted(record.by_epoch[5]) == drawn.clean_indices().tolist()
    assert (module.net[4].weight[callbacks[1].mask.pruned_indices()] == 0).all()


def test_testing_an_earlier_checkpoint_does_not_lose_what_the_fit_found(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = trio(3)
    module = Toy()
    trainer = fit(module, BlobsData(Blobs()), [*callbacks, keep], enable_checkpointing=True)
    drawn, mask = callbacks[0].partition, callbacks[1].mask
    trainer.validate(module, BlobsData(Blobs()), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert callbacks[0].partition is drawn
    assert callbacks[1].mask is mask
    assert callbacks[2].is_active


def test_other_labels_of_the_same_number_are_refused_on_resume(checkpoints):
    module = Toy()
    with pytest.raises(ValueError, match=r"every dataset index to keep its label, but \d+ of 32 changed"):
        fit(module, BlobsData(Blobs(101, seed=1)), trio(2), ckpt_path=checkpoints / "epoch=2.ckpt")
    assert module.steps == 0


class Shifted(Blobs):
    """The same labels with other inputs."""

    def __init__(self, size, shift=0.0, **kwargs):
        super().__init__(size, **kwargs)
        self.x = self.x + shift


@pytest.mark.parametrize("epoch", [1, 2], ids=["between the passes", "after the swap"])
def test_other_inputs_with_the_same_labels_are_refused_on_resume(checkpoints, epoch):
    module, path = Toy(), checkpoints / f"epoch={epoch}.ckpt"
    with pytest.raises(ValueError, match="100% of 16 sampled items have another content; use the same data"):
        fit(module, BlobsData(Shifted(101, 0.01)), trio(2), ckpt_path=path)
    assert module.steps == 0
    callbacks = trio(2, data=DataFormat(verify=False))
    fit(module, BlobsData(Shifted(101, 0.01)), callbacks, ckpt_path=path)
    assert module.steps > 0
    assert callbacks[0].partition.is_clean.any()


@pytest.mark.parametrize("augment", ["torch", "numpy"])
def test_random_augmentation_is_not_taken_for_other_data(tmp_path, augment):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    for first, then in ((augment, augment), (augment, ""), ("", augment)):
        fit(Toy(), BlobsData(Blobs(101, augment=first)), [*trio(2), keep], enable_checkpointing=True)
        callbacks = trio(2)
        fit(Toy(), BlobsData(Blobs(101, augment=then)), callbacks, ckpt_path=tmp_path / "epoch=1.ckpt")
        assert callbacks[0].partition.fingerprint.startswith("101:")


def test_the_partition_carries_the_fingerprint(tmp_path):
    callbacks = trio(2)
    fit(Toy(), BlobsData(Blobs(101)), callbacks)
    drawn = callbacks[0].partition
    assert drawn.fingerprint == fingerprint(DataLoader(Blobs(101)))
    drawn.save(tmp_path / "partition.pt")
    assert type(drawn).load(tmp_path / "partition.pt").fingerprint == drawn.fingerprint


class Resumable(DataLoader):
    """A loader that knows how far it is, as torchdata's does; Lightning keeps that in the checkpoint."""

    given = first = 0

    def __iter__(self):
        first, self.first = self.first, 0
        return self._from(first, super().__iter__())

    def _from(self, first, batches):
        for number, batch in enumerate(batches, start=1):
            if number > first:
                self.given = number
                yield batch

    def state_dict(self):
        return {"given": self.given % len(self)}

    def load_state_dict(self, state):
        self.first = state["given"]


class ResumableData(BlobsData):
    def train_dataloader(self):
        sampler = DistributedSampler(self.train, num_replicas=1, rank=0, seed=1)
        return Resumable(self.train, batch_size=16, sampler=sampler)


@pytest.mark.parametrize(
    ("evidence", "finetune"),
    [("eval_passes", {}), ("eval_passes", {"mode": "layers", "lr": 0.01}), ("train_steps", {})],
    ids=["full", "layers, lr", "training steps that cannot be read"],
)
def test_within_an_epoch_a_loader_that_resumes_makes_it_exact(tmp_path, evidence, finetune):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=5)
    module, data, callbacks = Toy(), ResumableData(Blobs(101)), trio(2, finetune=finetune, evidence_from=evidence)
    fit(module, data, [*callbacks, keep], enable_checkpointing=True, val_check_interval=1.0)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) > 3
    for path in paths:
        again, ours = Toy(), trio(2, finetune=finetune, evidence_from=evidence)
        fit(again, ResumableData(data.train), ours, ckpt_path=path)
        assert_same_weights(weights(again), weights(module))
        assert ours[0].partition.clean_probability.equal(callbacks[0].partition.clean_probability)
        assert ours[1].mask.keep.equal(callbacks[1].mask.keep)


def test_within_an_epoch_lightning_begins_the_data_of_the_epoch_again(tmp_path):
    """Of a loader that does not resume, it draws the first batches twice and leaves out the last: not exact, but sound.

    The partition then also lacks what the training steps before the checkpoint have shown.
    """
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    fit(Toy(), BlobsData(Blobs(101), by_epoch=True), [*trio(2), keep], enable_checkpointing=True)
    for path in sorted(tmp_path.glob("*.ckpt")):
        data, callbacks, module = BlobsData(Blobs(101), by_epoch=True), trio(2), Toy()
        record = IndexRecorder(data.train)
        trainer = fit(module, data, [*callbacks, record], ckpt_path=path, max_epochs=5)
        clean = callbacks[0].partition.clean_indices().tolist()
        assert callbacks[0].partition.epoch == 2
        assert sorted(record.by_epoch[4]) == clean
        assert all(set(record.by_epoch.get(epoch, [])) <= set(clean) for epoch in (2, 3))
        assert trainer.current_epoch == 5
