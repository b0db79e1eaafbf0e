"""What outlives a fit: the callbacks' results, and neither the Trainer nor the weights and data that it leads to."""

import gc
import weakref

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, default_collate

from lightning_unlearn import UnlearnReport
from tests.toys import Blobs, BlobsData, Toy, fit, trio


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
