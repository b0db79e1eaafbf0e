"""Copies of a sample are one sample for whatever is estimated; each is judged by itself."""

import pytest
import torch

from lightning_unlearn import AttributionPartitionCallback
from tests.toys import Blobs, BlobsData, Toy, fit


def judged(noise, copies, given=None):
    """Of 300 samples and copies of a right one, who is suspect; and which labels are wrong."""
    data = Blobs(300, noise)
    of = int((~data.wrong).nonzero()[0])
    label = data.y[of].item() if given is None else given
    data.x = torch.cat([data.x, data.x[of].expand(copies, -1)])
    data.y = torch.cat([data.y, torch.full((copies,), label)])
    callback = AttributionPartitionCallback(at_epoch=6, dry_run=True)
    fit(Toy(), BlobsData(data), [callback], max_epochs=7)
    if given is None:
        # The sample and its copies weigh as much as any other, for who ranks neurons.
        torch.testing.assert_close(callback.sample_weight[300:].sum() + callback.sample_weight[of], torch.tensor(1.0))
        assert callback.sample_weight.sum().round() == 300
    return ~callback.partition.is_clean, data.wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.25])
def test_a_thousand_copies_of_a_right_sample_do_not_condemn_the_others(noise):
    suspect, wrong = judged(noise, 1000)
    assert not suspect[300:].any()
    assert int((suspect[:300] & wrong).sum()) == int(wrong.sum())
    assert int((suspect[:300] & ~wrong).sum()) <= 2
