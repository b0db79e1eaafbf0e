"""From evidence to a partition on a fit that has no Trainer."""

import torch
from torch.nn.functional import cross_entropy

from lightning_unlearn.attribution import GRADIENT_X_ACTIVATION
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.evidence.eval_pass import ScoringPass, make_attributor
from lightning_unlearn.evidence.rank_share import Ranks, RankShare
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from lightning_unlearn.partitioning.apply_recipe import apply_recipe, validation_accuracy
from lightning_unlearn.partitioning.build import CleanCriteria, build_partition
from lightning_unlearn.recipes import get_recipe
from tests.fake_fit import FakeFit
from tests.toys import CLASSES, Blobs, auroc, mlp


def test_wrong_labels_are_told_from_right_ones():
    torch.manual_seed(0)
    data = Blobs(203)
    fit, trajectory = FakeFit(mlp(), data), TrainingDynamics(203, CLASSES)
    optimizer = torch.optim.SGD(fit.model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(8):
        loss = cross_entropy(fit.model(data.x), data.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    attributor = make_attributor(fit, LayerPoint("7", "input"), GRADIENT_X_ACTIVATION)
    share = ScoringPass(fit, attributor, trajectory, True, False, None).run()
    recipe = get_recipe("aum")
    of_rank = RankShare.by_index(203, Ranks())
    judged, label = apply_recipe(fit, share, trajectory, of_rank, recipe, lambda evidence: evidence)
    criteria = CleanCriteria(precision=0.85, min_class_fraction=0.1)
    partition = build_partition(judged, label, criteria, fit.reduce, recipe=recipe.name, layer="head", epoch=1)
    assert partition.label.equal(data.y)
    assert auroc(1 - partition.clean_probability, data.wrong) > 0.9
    assert validation_accuracy(fit) is None
