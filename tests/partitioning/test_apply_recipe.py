"""What is made of each rank's share, in sums over the ranks."""

from types import SimpleNamespace

import pytest
import torch

from lightning_unlearn.partitioning.apply_recipe import share_predicted
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks


def seen(rows):
    label, said = torch.arange(12) % 3, torch.arange(12) % 4
    weight = torch.tensor([1.0, 0.5, 0.5, 0.0] * 3)
    evidence = SimpleNamespace(weight=weight[rows], label=label[rows], prediction=said[rows])
    return [SimpleNamespace(evidence=evidence)]


def test_the_share_of_labels_that_is_predicted_is_that_of_all_ranks():
    whole = share_predicted(seen(slice(None)), no_reduce)
    assert whole == pytest.approx((1 + 0.5 + 0.5) / 6)
    ranks = run_ranks(lambda rank, reduce: share_predicted(seen(slice(rank, None, 2)), reduce), 2)
    assert ranks == [pytest.approx(whole)] * 2


def test_without_a_label_that_counts_there_is_none_to_predict():
    assert share_predicted(seen(slice(3, None, 4)), no_reduce) == 0
