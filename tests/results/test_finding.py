"""What is said first: how many labels look wrong, and the two lists."""

from dataclasses import replace

import pytest
import torch

from lightning_unlearn import Partition
from lightning_unlearn.results.finding import finding_of

RATE = "about 3.0% of the labels (1.9% to 4.4%) look wrong"


def lists_of(suspects, worth, *, doubt=0.14, **changes):
    """A partition with so many suspects, and so many that are worth a look after them."""
    suspect, clean = torch.arange(1000) < suspects, torch.full((1000,), 0.999)
    clean[:suspects], clean[suspects : suspects + worth] = doubt, 0.4999
    label, sure = torch.zeros(1000, dtype=torch.int64), torch.ones(1000)
    reason, matrix = suspect.to(torch.uint8), torch.zeros(0, 0)
    parts = (clean, ~suspect, label, sure, 0.03, label, sure, sure, reason, matrix, "label", "input of 'fc'", 5)
    return Partition(*parts, **({"noise_rate_interval": (0.019, 0.044)} | changes))


@pytest.mark.parametrize(
    ("partition", "said"),
    [
        (
            lists_of(212, 300, often_called=((3, 5, 0.23),)),
            f"{RATE}; 212 suspects, about 9 in 10 expected to be wrong; the next 300 are worth a look; class 3 is often"
            " labeled 5 (23%)",
        ),
        (
            lists_of(7, 1, doubt=0.01, noise_rate_interval=(0.019, 1.0)),
            "about 3.0% of the labels look wrong (at least 1.9%); 7 suspects, nearly all expected to be wrong; the next"
            " one is worth a look",
        ),
        (
            lists_of(9, 0, doubt=0.01, noise_rate_interval=(0.0, 1.0)),
            "about 3.0% of the labels look wrong; 9 suspects, nearly all expected to be wrong",
        ),
        (lists_of(1, 0, doubt=0.28), f"{RATE}; 1 suspect, about 7 in 10 expected to be wrong"),
        (lists_of(0, 300), "no suspects"),
        (
            lists_of(20, 0, noise_rate_interval=None),
            "20 of 1,000 samples are suspect, estimated noise rate 3.0%",
        ),
        (
            lists_of(0, 0, noise_rate_interval=None, warning="some class has no name, so nothing can be told"),
            "nothing is known about the samples",
        ),
    ],
    ids=["all", "lower bound", "no bound", "one", "none", "not estimated", "not known"],
)
def test_what_is_said(partition, said):
    assert finding_of(partition) == said


def test_classes_are_named_where_all_of_a_pair_are_known():
    partition = lists_of(20, 0, often_called=((1, 0, 0.5), (0, 2, 0.25)))
    said = "; 'dog' is often labeled 'cat' (50%); class 0 is often labeled 2 (25%)"
    assert finding_of(partition, ["cat", "dog"]).endswith(said)


def test_corrupted_inputs_are_no_labels():
    partition = lists_of(20, 0)
    partition = replace(partition, reason=(2 * partition.reason).to(torch.uint8))
    assert finding_of(partition).startswith("about 3.0% of the samples (")
