"""What makes a sample clean, doubtful or suspect."""

import pytest
import torch

from lightning_unlearn.partitioning.build import CleanCriteria, build_partition
from lightning_unlearn.partitioning.label_scores import ShardResult
from lightning_unlearn.recipes import RecipeResult
from lightning_unlearn.recipes.base import NoiseEstimate
from lightning_unlearn.recipes.evidence import Evidence


def partition_of(probability, label, share):
    """What is made of probabilities of labels of which some are wrong."""
    size, classes = len(label), int(label.max()) + 1
    none, one = torch.zeros(size), torch.ones(size)
    evidence = Evidence(
        index=torch.arange(size),
        weight=one,
        label=label,
        attribution=torch.zeros(size, 0),
        basis=torch.zeros(classes, 0),
        margin=none,
        aum=none,
        label_confidence=one,
        uncertainty=none,
        loss=none,
        prediction=label,
    )
    noise = NoiseEstimate("found", rate=0.3, interval=(0.2, 0.4), z_score=9.0)
    verdict = RecipeResult(probability, (label + 1) % classes, label_probability=probability, noise=noise)
    judged = [ShardResult(evidence, one, verdict)]
    criteria = CleanCriteria(precision=0.85, min_class_fraction=share)
    return build_partition(judged, label, criteria, lambda x: x, recipe="r", layer="l", epoch=1)


@pytest.mark.parametrize(("share", "trained"), [(0.0, [2, 3]), (0.1, [3]), (0.5, [2, 3])])
def test_a_class_of_which_nothing_is_sure_is_trained_on_all_the_same(share, trained):
    # Of the second class two are clean, none of them surely.
    probability = torch.tensor([0.01, 0.02, 0.6, 0.65, 0.99, 0.98, 0.97, 0.6])
    label = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    partition = partition_of(probability, label, share)
    assert partition.suspect_indices().tolist() == [0, 1]
    assert partition.trained_on().nonzero().flatten().tolist() == [*trained, 4, 5, 6]
    assert partition.is_actionable
