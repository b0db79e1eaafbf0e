import pytest
import torch
from sklearn.linear_model import Ridge

from lightning_unlearn.functional.leave_one_out import leave_one_out_scores
from tests.ranks import run_ranks


def draw(n=60, dimension=5, classes=3):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(classes, (n,), generator=generator)
    features = torch.randn(n, dimension, generator=generator).double() + 1.5 * torch.eye(dimension)[label]
    return features, label


def test_is_what_refits_without_each_sample_say():
    features, label = draw()
    scores = leave_one_out_scores(features, label, torch.ones(60), 3, penalties=[0.1])
    centered = features - features.mean(0)
    alpha = 0.1 * torch.linalg.eigvalsh(centered.T @ centered).mean().item()
    target = torch.nn.functional.one_hot(label, 3).double()
    for i in (0, 17, 59):
        rest = torch.arange(60) != i
        # The penalty is on the slopes about the mean of all samples, which is close to that of the others.
        model = Ridge(alpha=alpha).fit(features[rest], target[rest])
        expected = torch.from_numpy(model.predict(features[i : i + 1])).squeeze(0)
        torch.testing.assert_close(scores[i], expected, atol=1e-6, rtol=0)


def test_a_label_does_not_speak_for_itself():
    features, label = draw()
    changed = label.clone()
    changed[7] = (label[7] + 1) % 3
    before, after = (
        leave_one_out_scores(features, y, torch.ones(60), 3, penalties=[0.01])[7] for y in (label, changed)
    )
    torch.testing.assert_close(before, after)


def test_rows_without_weight_do_not_count():
    features, label = draw()
    weight = (torch.arange(60) < 40).double()
    padded = leave_one_out_scores(features, label, weight, 3)
    torch.testing.assert_close(padded[:40], leave_one_out_scores(features[:40], label[:40], torch.ones(40), 3))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_what_one_finds(world_size):
    features, label = draw()
    one = leave_one_out_scores(features, label, torch.ones(60), 3)

    def on_rank(rank, reduce):
        part = slice(rank, None, world_size)
        return leave_one_out_scores(features[part], label[part], torch.ones(len(label[part])), 3, reduce=reduce)

    for rank, scores in enumerate(run_ranks(on_rank, world_size)):
        torch.testing.assert_close(scores, one[rank::world_size])
