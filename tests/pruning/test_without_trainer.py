"""Step 4 on a fit that has no Trainer."""

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_unlearn.pruning.criteria import CRITERIA, Sensitivity
from lightning_unlearn.pruning.holding import HeldEntries
from lightning_unlearn.pruning.ranking import RankingTarget, rank_neurons
from lightning_unlearn.pruning.run import PruneSettings, prune
from lightning_unlearn.pruning.sites import named_site
from lightning_unlearn.pruning.state import PruneState
from tests.callbacks.published import ANTI, FLAG, Planted, PlantedData, make_partition
from tests.fake_fit import FakeFit


@pytest.fixture
def planted():
    """A fit, its partition and the layer to prune, in which one neuron says whether a label is wrong."""
    data = PlantedData()
    fit = FakeFit(Planted(), TensorDataset(data.x, data.y), batch_size=32)
    trace, _ = fit.probe()
    return fit, make_partition(data.probability(), data.y), named_site(fit.model, "fc", lambda: trace, trace)


@pytest.mark.parametrize("criterion", [Sensitivity(), CRITERIA["mean_abs_ratio"]])
def test_the_neuron_that_tells_noise_comes_first(planted, criterion):
    fit, partition, site = planted
    (ranking,) = rank_neurons(fit, [site], criterion, RankingTarget(partition, torch.ones(len(partition)), [None]))
    assert ranking.order[0] == FLAG
    assert ANTI not in ranking.order[:1]
    assert ranking.live == 7


@pytest.mark.parametrize("dry_run", [False, True])
def test_it_is_pruned_unless_in_a_dry_run(planted, dry_run):
    fit, partition, site = planted
    fit.source.dry_run = dry_run
    before = fit.model.fc.weight.detach().clone()
    held = HeldEntries()
    settings = PruneSettings(["fc"], 0.2, Sensitivity(), None)
    result = prune(fit, partition, PruneState([site]), settings, held)
    (mask,) = result.state.masks
    assert mask.pruned_indices().tolist() == [FLAG]
    assert result.state.is_proposal is dry_run is not bool(held)
    expected = before.clone()
    if not dry_run:
        expected[FLAG] = 0
    assert fit.model.fc.weight.equal(expected)
    held.release()
