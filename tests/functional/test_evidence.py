from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.functional import update_majority


def vote(choices):
    """The candidates after all passes; ``choices`` is (passes, N)."""
    candidate = torch.zeros(choices.shape[1], dtype=torch.int64)
    votes = torch.zeros_like(candidate)
    for choice in choices:
        candidate, votes = update_majority(candidate, votes, choice)
        assert (votes >= 0).all()
    return candidate


def test_hand_computed():
    # Sample 0: 1 1 2 -> 1; sample 1: 1 2 2 -> 2 takes over when the votes of 1 are spent.
    assert vote(torch.tensor([[1, 1], [1, 2], [2, 2]])).tolist() == [1, 2]


@given(
    st.integers(1, 12).flatmap(
        lambda passes: st.lists(st.lists(st.integers(0, 3), min_size=passes, max_size=passes), min_size=1, max_size=5)
    )
)
def test_the_class_of_more_than_half_of_the_passes_is_found(samples):
    candidate = vote(torch.tensor(samples).T)
    for found, choices in zip(candidate.tolist(), samples, strict=True):
        (winner, count), *_ = Counter(choices).most_common(1)
        assert found in choices
        if count > len(choices) / 2:
            assert found == winner


def test_inputs_are_left_as_they_are():
    candidate, votes, choice = torch.tensor([1]), torch.tensor([0]), torch.tensor([3])
    update_majority(candidate, votes, choice)
    assert (candidate.item(), votes.item(), choice.item()) == (1, 0, 3)
