from itertools import permutations

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, SensitivityPruneCallback
from tests.toys import Blobs, BlobsData, Toy, assert_same_weights, fit, mlp, trio, weights


@pytest.mark.parametrize("mode", ["full", "layers"])
def test_every_order_gives_the_same_weights(mode):
    final = []
    for order in permutations(range(3)):
        callbacks = trio(2, finetune={"mode": mode, "lr": 0.01})
        module = Toy(lambda: mlp(0.3))
        fit(module, BlobsData(Blobs(101)), [callbacks[i] for i in order])
        assert module.steps_by_epoch[3] < module.steps_by_epoch[1]
        final.append(weights(module))
    for other in final[1:]:
        assert_same_weights(final[0], other)


def test_the_users_order_is_kept_apart_from_progress_bars(tmp_path):
    during = []

    class Users(L.Callback):
        def on_train_start(self, trainer, pl_module):
            during[:] = trainer.callbacks

    partition, prune, finetune = trio(2)
    bar, saved, first, last = TQDMProgressBar(), ModelCheckpoint(tmp_path), Users(), Users()
    trainer = fit(
        Toy(),
        BlobsData(Blobs(101)),
        [first, partition, bar, prune, last, saved, finetune],
        max_epochs=3,
        enable_progress_bar=True,
        enable_checkpointing=True,
    )
    assert during == [first, partition, prune, finetune, bar, last, saved]
    # Lightning itself has put its checkpoint last.
    assert trainer.callbacks == [first, partition, bar, prune, last, finetune, saved]


@pytest.mark.parametrize("alone", [SensitivityPruneCallback, CleanSubsetFinetuneCallback])
@pytest.mark.parametrize("partitions", [0, 2])
def test_a_missing_partner_is_an_error_that_shows_the_lines_to_add(alone, partitions):
    module = Toy()

    class Second(AttributionPartitionCallback):
        @property
        def state_key(self):
            return "second"

    callbacks = [AttributionPartitionCallback(at_epoch=1), Second(at_epoch=2)][:partitions]
    with pytest.raises(MisconfigurationException) as error:
        fit(module, BlobsData(Blobs()), [*callbacks, alone()])
    assert module.steps == 0
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert f"{alone.__name__} needs an AttributionPartitionCallback" in lines[0]
    assert lines[1].startswith(f"{partitions or 'none'}.")
    assert f"trainer = Trainer(callbacks=[AttributionPartitionCallback(), {alone.__name__}(...)])" in lines
    assert "- class_path: lightning_unlearn.AttributionPartitionCallback" in lines
    assert f"- class_path: lightning_unlearn.{alone.__name__}" in lines


def test_layers_need_names_or_a_callback_that_prunes():
    partition, _, finetune = trio(2, finetune={"mode": "layers"})
    module = Toy()
    with pytest.raises(MisconfigurationException, match=r"set layers=\[...\], or add a SensitivityPrune"):
        fit(module, BlobsData(Blobs()), [partition, finetune])
    assert module.steps == 0


def test_pruning_and_fine_tuning_work_without_each_other():
    for partner in (1, 2):
        callbacks = trio(2)
        fit(Toy(), BlobsData(Blobs(101)), [callbacks[partner], callbacks[0]], max_epochs=3)
        assert len(callbacks[0].partition) == 101
    assert callbacks[2].is_active
