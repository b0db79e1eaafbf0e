"""Low precision and channels-last on the CPU, and, where there is one, on a GPU: `pytest -m gpu`."""

import pytest
import torch
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
