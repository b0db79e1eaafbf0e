import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control
from scipy.stats import t as student

from lightning_unlearn.functional import Sensitivity, benjamini_hochberg, noise_neurons, select_neurons
from lightning_unlearn.functional.selection import check_amount, in_order, share_of


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=20), level=st.floats(0.01, 0.5))
@settings(deadline=None, max_examples=200)
def test_rejects_what_scipy_rejects(p, level):
    adjusted = false_discovery_control(np.array(p), method="bh")
    # Where the adjusted value is the level up to rounding, either answer is right.
    clear = np.abs(adjusted - level) > 1e-9
    rejected = benjamini_hochberg(torch.tensor(p, dtype=torch.float64), level).numpy()
    assert (rejected == (adjusted <= level))[clear].all()


def test_no_hypotheses_are_none_rejected():
    assert benjamini_hochberg(torch.zeros(0), 0.05).tolist() == []


def test_under_no_association_hardly_any_layer_names_a_neuron():
    generator = torch.Generator().manual_seed(0)
    named = 0
    for _ in range(400):
        z = torch.randn(64, generator=generator).double()
        found = Sensitivity(z, torch.ones(64).double(), torch.ones(64, dtype=torch.bool))
        named += len(noise_neurons(found, 0.05)) > 0
    # With nothing to find, one in twenty rejects anything at all, and half of those a neuron of the harmful sign.
    assert 0 < named < 400 * 0.05


def found(coefficient, error, live=None):
    coefficient = torch.tensor(coefficient).double()
    live = torch.ones(len(coefficient), dtype=torch.bool) if live is None else torch.tensor(live)
    return Sensitivity(coefficient, torch.tensor(error).double(), live)


def test_only_the_harmful_sign_is_named_the_worst_first():
    several = found([0.9, -0.2, -0.5, -0.3], [0.01] * 4)
    assert noise_neurons(several, 0.05).tolist() == [2, 3, 1]


def test_what_is_not_sure_is_not_named_however_large():
    several = found([-0.1, -3.0, -0.2], [0.01, 2.9, 0.01])
    assert noise_neurons(several, 0.05).tolist() == [2, 0]
    assert noise_neurons(several).tolist() == [1, 2, 0]


def test_dead_neurons_are_not_hypotheses():
    # Among 2 live neurons, p = 0.04 is below 0.05; with 98 dead ones counted it would not be.
    several = found([-2.054, -2.054, *[0.0] * 98], [1.0, 1.0, *[torch.inf] * 98], [True, True, *[False] * 98])
    assert noise_neurons(several, 0.05).tolist() == [0, 1]


def test_equal_scores_keep_their_order():
    score = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert in_order(score, torch.tensor([True, True, True, True, False])).tolist() == [1, 3, 0, 2]


def test_a_share_that_is_less_than_one_neuron_is_refused():
    check_amount(0.25, 4)
    with pytest.raises(ValueError, match=r"amount=0.2 of 4 neurons rounds to zero; use at least 0.25."):
        check_amount(0.2, 4)
    assert share_of(0.2, 4) == 0


def test_the_largest_magnitudes_are_pruned():
    sensitivity = torch.tensor([0.1, -0.9, 0.4, 0.5, -0.2])
    assert select_neurons(sensitivity, 0.4).tolist() == [True, False, True, False, True]


def test_the_share_is_rounded_down():
    assert (~select_neurons(torch.arange(1.0, 11), 0.29)).sum() == 2


@pytest.mark.parametrize(("amount", "neurons", "count"), [(0.29, 100, 29), (0.57, 100, 57), (1 / 49, 49, 1)])
def test_a_whole_number_of_neurons_is_not_lost_to_rounding(amount, neurons, count):
    assert int(amount * neurons) < count  # what the plain product gives
    assert (~select_neurons(torch.arange(1.0, neurons + 1), amount)).sum() == count


def test_the_share_is_of_the_live_neurons():
    dead = torch.zeros(6)
    live = torch.tensor([0.2, -0.4, 0.1, 0.3])
    keep = select_neurons(torch.cat([dead, live]), 0.5)
    assert keep.tolist() == [True] * 6 + [True, False, True, False]


def test_the_last_live_neuron_is_kept():
    assert select_neurons(torch.tensor([0.0, 0.0, 0.3, 0.0]), 0.75).all()


def test_equal_magnitudes_are_taken_in_order():
    assert select_neurons(torch.tensor([0.5, -0.5, 0.5, 0.5]), 0.5).tolist() == [False, False, True, True]


@pytest.mark.parametrize(("neurons", "least"), [(4, "0.25"), (3, "0.333334"), (512, "0.001954")])
def test_less_than_one_neuron_is_refused_with_an_amount_that_works(neurons, least):
    with pytest.raises(ValueError, match=rf"amount=0.001 of {neurons} neurons rounds to zero.* at least {least}\."):
        select_neurons(torch.ones(neurons), 0.001)
    assert (~select_neurons(torch.ones(neurons), float(least))).sum() == 1


def test_neurons_of_clean_samples_do_not_make_others_suspect():
    # Of a hundred neurons fifty are surely active for clean samples; one of the rest is at -2.3 by chance. In a
    # two-sided test of all together the fifty would carry it over the threshold (.0214 < .05 * 51 / 100).
    z = torch.zeros(100).double()
    z[:50], z[99] = 10.0, -2.3
    found = Sensitivity(z, torch.ones(100).double(), torch.ones(100, dtype=torch.bool))
    assert benjamini_hochberg(found.p_value(), 0.05)[99]
    assert len(noise_neurons(found, fdr_level=0.05)) == 0
    z[98] = -6.0
    assert noise_neurons(found, fdr_level=0.05).tolist() == [98]


@pytest.mark.parametrize(("t", "freedom"), [(2.0, 5.0), (-3.0, 12.0), (1.0, 40.0)])
def test_few_degrees_of_freedom_count_as_in_students_test(t, freedom):
    one = torch.ones(1).double()
    found = Sensitivity(t * one, one, one.bool(), freedom=freedom)
    assert found.p_value().item() == pytest.approx(2 * student.sf(abs(t), freedom), rel=0.03)
    assert found.harmful_p_value().item() == pytest.approx(student.cdf(t, freedom), rel=0.03)
