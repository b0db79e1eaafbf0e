"""Who is suspect: what a verdict says with and without an estimate of the noise."""

import pytest
import torch

from lightning_unlearn.recipes import RecipeResult
from lightning_unlearn.recipes.base import ACTED_Z, NAMED_Z, NoiseEstimate, noise_status
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks

CLEAN = torch.tensor([0.01, 0.1, 0.3, 0.45, 0.65, 0.8, 1.0, 1.0])
LABEL = torch.zeros(8, dtype=torch.int64)


def estimate(status="found"):
    return NoiseEstimate(status, 0.3, (0.2, 0.4), 9.0)


def suspects(precision, weight=None, **parts):
    verdict = RecipeResult(CLEAN, LABEL, label_probability=CLEAN, **parts)
    return verdict.suspects(torch.ones(8) if weight is None else weight, no_reduce, precision).nonzero().flatten()


@pytest.mark.parametrize(
    ("precision", "number"),
    [(0.99, 1), (0.9, 2), (0.85, 3), (0.75, 4), (0.69, 5), (0.5, 5)],
)
def test_the_longest_list_that_has_the_precision(precision, number):
    found = suspects(precision, noise=estimate())
    assert found.equal(torch.arange(number))
    assert 1 - CLEAN[found].mean() >= precision


def test_nothing_that_is_as_good_as_clean_is_in_it():
    # With the sixth, of p(wrong) .2, 61 % would still be wrong.
    assert len(suspects(0.6, noise=estimate())) == 5


@pytest.mark.parametrize("status", ["weak", "none"])
def test_what_is_not_found_is_not_acted_upon(status):
    assert not len(suspects(0.5, noise=estimate(status)))


@pytest.mark.parametrize("precision", [0.5, 0.99])
def test_without_an_estimate_one_half_decides(precision):
    assert suspects(precision).equal(torch.arange(4))


def test_rows_that_do_not_count_do_not_lengthen_the_list():
    weight = torch.ones(8)
    weight[:2] = 0
    assert suspects(0.65, weight, noise=estimate()).tolist() == [0, 1, 2]


def test_corrupted_inputs_are_suspect_and_no_part_of_the_list():
    broken = torch.ones(8)
    broken[[0, 7]] = 0.1
    assert suspects(0.85, noise=estimate("none"), input_probability=broken).tolist() == [0, 7]
    assert suspects(0.79, noise=estimate(), input_probability=broken).tolist() == [0, 1, 2, 7]


def test_two_ranks_have_the_list_of_one():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(3000, generator=generator).sqrt()
    clean[::50] = clean[0]
    weight = (torch.rand(3000, generator=generator) < 0.9).float()
    given = torch.zeros(3000, dtype=torch.int64)

    def of(rows, reduce=no_reduce):
        verdict = RecipeResult(clean[rows], given[rows], label_probability=clean[rows], noise=estimate())
        return verdict.suspects(weight[rows], reduce, 0.7)

    halves = torch.arange(0, 3000, 2), torch.arange(1, 3000, 2)
    found = run_ranks(lambda rank, reduce: of(halves[rank], reduce), 2)
    whole = of(torch.arange(3000))
    assert 0 < whole.sum() < 3000
    for rows, one in zip(halves, found, strict=True):
        assert one.equal(whole[rows])


@pytest.mark.parametrize(
    ("z", "wrong", "is_open", "status"),
    [
        (ACTED_Z, 0.5, False, "found"),
        (ACTED_Z, 0.5, True, "weak"),
        (ACTED_Z - 0.1, 40, False, "weak"),
        (NAMED_Z - 0.1, 40, False, "none"),
        (50.0, 0.49, False, "none"),
    ],
)
def test_what_follows_from_how_sure_it_is_that_labels_are_wrong(z, wrong, is_open, status):
    assert noise_status(z, wrong, is_open=is_open) == status
