import pytest
import torch

from lightning_unlearn import SensitivityPruneCallback
from lightning_unlearn.functional.importance import neuron_sums
from lightning_unlearn.pruning.criteria import CRITERIA, Criterion, Magnitude, NeuronStatistics, Random, find_criterion
from tests.callbacks.published import Planted, PlantedData, Published, make_partition
from tests.toys import fit

SUMS = neuron_sums(torch.rand(9, 4, generator=torch.Generator().manual_seed(0)), torch.ones(9))


def test_names_are_those_of_the_log():
    assert {name: criterion.name for name, criterion in CRITERIA.items()} == {name: name for name in CRITERIA}
    assert find_criterion("taylor").needs_gradients
    assert find_criterion("rms_ratio").per_position


def test_random_differs_by_layer_and_by_epoch():
    first, other, later = (
        Random(1).score(NeuronStatistics(layer, epoch, SUMS, SUMS)) for layer, epoch in (("a", 1), ("b", 1), ("a", 2))
    )
    assert len({tuple(score.tolist()) for score in (first, other, later)}) == 3


@pytest.mark.parametrize("criterion", [Magnitude(), find_criterion("taylor")])
def test_what_a_criterion_needs_is_asked_for(criterion):
    with pytest.raises(ValueError, match=r"Expected .* but got None"):
        criterion.score(NeuronStatistics("a", 1, SUMS, SUMS))


class Tallest(Criterion):
    """The first neurons."""

    def score(self, neurons):
        return torch.arange(len(neurons.clean.total), 0, -1)


class Broken(Criterion):
    def __init__(self, score):
        self.value = score

    def score(self, neurons):
        return self.value


def pruned_by(criterion):
    data = PlantedData()
    prune = SensitivityPruneCallback("fc", amount=0.5, criterion=criterion, max_val_drop=None)
    fit(Planted(), data, [prune, Published(make_partition(data.probability(), data.y))], max_epochs=2)
    return prune


def test_a_criterion_of_the_users_own_chooses():
    prune = pruned_by(Tallest())
    assert prune.mask.pruned_indices().tolist() == [0, 1, 2]
    assert prune.settings()["criterion"] == "Tallest()"
    assert prune.criterion.name == "Tallest"


@pytest.mark.parametrize(
    ("score", "got"),
    [
        (torch.zeros(7), r"shape \(7,\)"),
        (torch.full((8,), torch.nan), "NaN or infinity"),
        ([0.0] * 8, "a list"),
    ],
)
def test_a_score_that_cannot_be_ranked_is_refused(score, got):
    with pytest.raises(ValueError, match=rf"score of criterion Broken .* 8 finite numbers, .*, but got {got}"):
        pruned_by(Broken(score))


def test_a_criterion_without_a_score_is_spoken_of():
    with pytest.raises(NotImplementedError, match="Expected Criterion to implement score"):
        pruned_by(Criterion())


def test_a_criterion_with_settings_is_recorded_with_them():
    prune = SensitivityPruneCallback(criterion=Random(seed=3))
    assert prune.settings()["criterion"] == "Random(seed=3)"
