"""Callbacks and packages of others that change the optimizer, or must not be worked beside."""

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_unlearn import AttributionPartitionCallback
from tests.toys import Blobs, BlobsData, IndexRecorder, Toy, assert_same_weights, fit, sgd, trio, weights

AT, EPOCHS = 2, 5


class WithBackbone(Toy):
    """What BackboneFinetuning asks for, with an optimizer over what is trained at first."""

    def __init__(self):
        super().__init__(optimizer=lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.05))

    @property
    def backbone(self):
        return self.net[:4]


class OwnFinetuning(BackboneFinetuning):
    """A user's, as finetuning-scheduler's is another of BaseFinetuning's."""


@pytest.mark.parametrize("kind", [BackboneFinetuning, OwnFinetuning])
@pytest.mark.parametrize(
    ("finetune", "word"),
    [
        ({"lr": 0.01}, "lr"),
        ({"optimizer": torch.optim.Adam}, "optimizer"),
        ({"optimizer": "restart"}, "optimizer"),
        ({"mode": "layers"}, "mode='layers'"),
        ({"warm_start": "shrink"}, "warm_start='shrink'"),
    ],
    ids=["lr", "optimizer", "restart", "layers", "warm start"],
)
def test_a_fresh_optimizer_beside_callbacks_that_add_parameter_groups_is_refused(kind, finetune, word):
    module = WithBackbone()
    with pytest.raises(MisconfigurationException) as error:
        fit(module, BlobsData(Blobs()), [*trio(AT, finetune=finetune), kind(3)])
    said = f"CleanSubsetFinetuneCallback({word}) cannot be combined with {kind.__name__}, which unfreezes layers, adds"
    assert str(error.value).startswith(said)
    assert f"Leave out {word} to keep the optimizer and its groups" in str(error.value)
    assert module.steps == 0


def run(unfreeze, keep=None, ckpt_path=None, ours_last=False):
    callbacks, data, module = trio(AT), BlobsData(Blobs(101), by_epoch=True), WithBackbone()
    record, backbone = IndexRecorder(data.train), BackboneFinetuning(unfreeze, backbone_initial_lr=0.01)
    order = [backbone, *callbacks] if ours_last else [*callbacks, backbone]
    extra = [record] if keep is None else [record, keep]
    kwargs = {"max_epochs": EPOCHS, "enable_checkpointing": keep is not None, "ckpt_path": ckpt_path}
    trainer = fit(module, data, [*order, *extra], **kwargs)
    return callbacks, module, record, trainer


@pytest.mark.filterwarnings("ignore:The provided params to be frozen")
@pytest.mark.parametrize("ours_last", [False, True], ids=["ours first", "ours last"])
@pytest.mark.parametrize("unfreeze", [1, 2, 3], ids=["before the partition", "with it", "after it"])
def test_without_one_the_optimizer_goes_on_with_its_groups(tmp_path, unfreeze, ours_last):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    (partition, *_), module, record, trainer = run(unfreeze, keep, ours_last=ours_last)
    clean = partition.partition.clean_indices().tolist()
    assert sorted(record.by_epoch[EPOCHS - 1]) == clean
    groups = [len(group["params"]) for group in trainer.optimizers[0].param_groups]
    # Batch norms of the backbone are trained all the time.
    assert groups == [8, 2]
    for epoch in range(EPOCHS - 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        (again, *_), other, read, resumed = run(unfreeze, ckpt_path=path, ours_last=ours_last)
        assert sorted(read.by_epoch[EPOCHS - 1]) == again.partition.clean_indices().tolist()
        assert [len(group["params"]) for group in resumed.optimizers[0].param_groups] == groups
        # Resumed later, BackboneFinetuning leaves the backbone frozen (Lightning #21901).
        if epoch < unfreeze:
            assert again.partition.is_clean.equal(partition.partition.is_clean)
            assert_same_weights(weights(other), weights(module), 1e-6)


def of_opacus(kind):
    """A class as Opacus has it, which is not installed."""
    return type("DP" + kind.__name__, (kind,), {"__module__": "opacus.somewhere"})


class PrivateLoader(BlobsData):
    def train_dataloader(self):
        return of_opacus(DataLoader)(self.train, batch_size=16)


def private_optimizer(module):
    return of_opacus(torch.optim.SGD)(module.parameters(), lr=0.05)


@pytest.mark.parametrize("ours", [lambda: trio(AT), lambda: [AttributionPartitionCallback(at_epoch=AT)]])
@pytest.mark.parametrize(
    ("optimizer", "data", "name"),
    [(private_optimizer, BlobsData, "DPSGD"), (sgd, PrivateLoader, "DPDataLoader")],
    ids=["optimizer", "loader"],
)
def test_differential_privacy_is_refused_before_the_first_step(optimizer, data, name, ours):
    module = Toy(optimizer=optimizer)
    said = rf"which breaks the privacy guarantee of Opacus \({name} was found\)"
    with pytest.raises(MisconfigurationException, match=said):
        fit(module, data(Blobs()), ours())
    assert module.steps == 0
