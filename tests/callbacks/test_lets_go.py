"""What outlives a fit: the callbacks' results, and neither the Trainer nor the weights and data that it leads to."""

import copy
import gc
import weakref

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, default_collate

from lightning_unlearn import AttributionPartitionCallback, UnlearnReport
from lightning_unlearn.callbacks.base import FitCallback
from tests.toys import Blobs, BlobsData, Toy, fit, make_trainer
from tests.toys import quick_trio as trio


class Offering(BlobsData):
    """Its loaders lead back to it, and so to the Trainer."""

    def collate(self, items):
        return default_collate(items)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16, shuffle=True, collate_fn=self.collate)

    def attribution_dataloader(self):
        return DataLoader(self.train, batch_size=16, collate_fn=self.collate)


class Halts(Exception):
    pass


class Stops(Toy):
    def training_step(self, batch):
        if self.current_epoch == 2:
            raise Halts
        return super().training_step(batch)


def run(folder, kind=Toy, then=None, ckpt_path=None):
    """References to what a fit was made of, and the callbacks, which somebody holds on to."""
    finetune = {"mode": "layers", "lr": 0.01, "on_noisy": "relabel"}
    ours = [*trio(1, finetune=finetune), UnlearnReport(folder, samples=3)]
    module, data, keep = kind(), Offering(Blobs(101)), ModelCheckpoint(folder, save_last=True)
    trainer = None
    try:
        trainer = fit(module, data, [*ours, keep], ckpt_path=ckpt_path, max_epochs=4, enable_checkpointing=True)
    except Halts:
        assert kind is Stops
    if then is not None:
        getattr(trainer, then)(module, datamodule=data, verbose=False)
    return [weakref.ref(one) for one in (trainer or module, module, data)], ours


@pytest.mark.parametrize(
    ("kind", "then"), [(Toy, None), (Stops, None), (Toy, "validate")], ids=["a fit", "an exception", "then validated"]
)
def test_the_callbacks_outlive_the_trainer(tmp_path, kind, then):
    references, ours = run(tmp_path, kind, then)
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert isinstance(ours[0].partition.is_clean, torch.Tensor)


def test_so_they_do_after_a_fit_that_goes_on_from_a_checkpoint(tmp_path):
    run(tmp_path, Stops)
    references, _ = run(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


class Notes(L.Callback):
    """Which contexts our callbacks have, and what a copy of one has, in each of the hooks."""

    def __init__(self):
        self.contexts = []

    def note(self, trainer, *_):
        ours = [callback for callback in trainer.callbacks if isinstance(callback, FitCallback)]
        self.contexts.append([weakref.ref(callback.fit) for callback in ours])
        assert copy.deepcopy(ours[0])._fit is None

    on_fit_start = on_train_start = on_train_epoch_start = on_train_epoch_end = on_train_end = on_fit_end = note


def test_a_fit_has_one_context_and_every_fit_its_own(tmp_path):
    notes, ours = Notes(), [*trio(1), UnlearnReport(tmp_path, samples=3)]
    trainer = make_trainer([*ours, notes], max_epochs=2)
    seen = []
    for last in (2, 4):
        trainer.fit_loop.max_epochs = last
        trainer.fit(Toy(), datamodule=Offering(Blobs(101)))
        every = [one() for hook in notes.contexts for one in hook]
        assert len(every) == 4 * len(notes.contexts) >= 4 * 8
        assert len(set(map(id, every))) == 1
        seen.append(notes.contexts[0][0])
        notes.contexts.clear()
        with pytest.raises(RuntimeError, match="AttributionPartitionCallback is not part of a fit"):
            _ = ours[0].fit
    assert all(callback._fit is None for callback in ours)
    every = None
    gc.collect()
    assert [one() for one in seen] == [None, None]


def test_a_context_that_a_fit_left_behind_is_not_taken_up():
    ours = trio(1)
    trainer, module, data = make_trainer(ours, max_epochs=2), Toy(), BlobsData(Blobs(101))
    trainer.fit(module, datamodule=data)
    trainer.strategy.connect(module)
    for callback in ours:
        callback.setup(trainer, module, "fit")
    left = ours[0].fit
    assert all(callback.fit is left for callback in ours)
    ours[1].on_fit_start(trainer, module)
    ours[0].setup(trainer, module, "fit")
    assert ours[0].fit is not left
    ours[2].setup(trainer, module, "fit")
    assert ours[2].fit is ours[0].fit


def test_two_partitions_have_a_context_each_with_one_memory():
    class Second(AttributionPartitionCallback):
        @property
        def state_key(self):
            return "second"

    found = []

    class Looks(L.Callback):
        def on_train_start(self, trainer, pl_module):
            found.extend(callback.fit for callback in (first, second))

    first, second = AttributionPartitionCallback(at_epoch=1), Second(at_epoch=2)
    fit(Toy(), BlobsData(Blobs(101)), [first, second, Looks()], max_epochs=3)
    assert [one.source for one in found] == [first, second]
    assert found[0].memory is found[1].memory
    assert (first.partition.epoch, second.partition.epoch) == (1, 2)
