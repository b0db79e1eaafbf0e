"""Low precision and channels-last on the CPU, and, where there is one, on a GPU: `pytest -m gpu`."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

from tests.toys import Blobs, BlobsData, Toy, auroc, convnet, fit, trio, weights

AT, EPOCHS, SIZE = 4, 6, 240
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


class ChannelsLast(Toy):
    """Keeps its weights, and gets its images, with the channels last in memory."""

    def __init__(self):
        super().__init__(convnet)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return super().forward(x.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch):
        return cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("accelerator", "precision"),
    [
        ("cpu", "32"),
        ("cpu", "bf16-mixed"),
        pytest.param("gpu", "32", marks=ON_GPU),
        pytest.param("gpu", "bf16-mixed", marks=ON_GPU),
        pytest.param("gpu", "16-mixed", marks=ON_GPU),
        pytest.param("gpu", "bf16-true", marks=ON_GPU),
    ],
)
@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
def test_low_precision_and_channels_last(accelerator, precision, evidence):
    data = Blobs(SIZE, image=True)
    partition, prune, finetune = ours = trio(
        AT, evidence_from=evidence, prune={"layer": "net.0", "criterion": "random", "amount": 0.3, "max_val_drop": None}
    )
    module = ChannelsLast()
    fit(module, BlobsData(data), ours, max_epochs=EPOCHS, accelerator=accelerator, precision=precision)
    assert auroc(-partition.partition.clean_probability, data.wrong) > 0.9
    assert finetune.is_active
    state = weights(module)
    pruned = prune.mask.pruned_indices()
    assert len(pruned) > 0
    assert (state["net.0.weight"][pruned] == 0).all()
    assert state["net.0.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
def test_a_data_set_that_lies_in_the_memory_of_the_device(device, evidence):
    data = Blobs(SIZE)
    data.x, data.y = data.x.to(device), data.y.to(device)
    partition, _, finetune = ours = trio(AT, evidence_from=evidence)
    accelerator = "gpu" if device == "cuda" else "cpu"
    # Pinned memory is for what lies elsewhere.
    fit(Toy(), BlobsData(data, pin_memory=False), ours, max_epochs=EPOCHS, accelerator=accelerator)
    assert auroc(-partition.partition.clean_probability, data.wrong) > 0.9
    assert partition.partition.label.equal(data.y.cpu())
    assert finetune.is_active


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=ON_GPU)])
def test_a_checkpoint_of_the_cpu_goes_on_where_the_fit_runs(accelerator, tmp_path):
    data = Blobs(SIZE)
    before = trio(AT)
    save = ModelCheckpoint(tmp_path, filename="at", every_n_epochs=AT - 1, save_top_k=-1, enable_version_counter=False)
    fit(Toy(), BlobsData(data, by_epoch=True), [*before, save], max_epochs=EPOCHS, enable_checkpointing=True)
    after = trio(AT)
    options = {"max_epochs": EPOCHS, "accelerator": accelerator, "ckpt_path": tmp_path / "at.ckpt"}
    fit(Toy(), BlobsData(data, by_epoch=True), after, **options)
    apart = after[0].partition.clean_probability - before[0].partition.clean_probability
    # Sums on another device are rounded otherwise.
    assert apart.abs().max() < 0.05
    assert after[2].is_active
