import copy

import torch
from torch import nn

from benchmarks.projection import project
from benchmarks.pruning_tables import tables


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def test_weights_lose_what_sure_samples_do_not_use():
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(50, 4) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    before, expected = layer[0].weight.clone(), layer(x)
    # The first that is tried, the largest alpha, is the best.
    scores = iter([0.0, 1.0, *[0.5] * 9])
    assert project(layer, x, lambda _: next(scores)) == 1e5
    torch.testing.assert_close(layer[0].weight[:, :2], before[:, :2], rtol=1e-3, atol=1e-3)
    assert (layer[0].weight[:, 2:].abs() < 1e-6).all()
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)


def test_where_no_projection_is_better_all_is_as_it_was():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    assert project(model, torch.randn(120, 1, 4, 4), lambda _: 0.5) is None
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model[1].training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tables_tell_the_difference_from_no_pruning_of_the_same_seeds():
    costs = {"full": [100.0, 1000.0, 2.0], "small": [50.0, 400.0, 1.0]}
    rows = [
        {"kind": "digits", "regime": "peak", "seed": seed, "arm": arm, "accuracy": accuracy, **more}
        for seed in (1, 2)
        for arm, accuracy, more in (
            ("base", 0.5, {"memorized": 0.25}),
            ("no pruning", 0.6 + 0.1 * seed, {}),
            ("random 0.5", 0.6 + 0.1 * seed - 0.02, {"costs": costs}),
        )
    ]
    rows.append({**rows[2], "arm": "Taylor 0.5"})
    text = tables(rows)
    assert "| no pruning | 75.0 +- 7.1 |" in text
    assert "| random 0.5 | 73.0 +- 7.1 (-2.0) |" in text
    assert "| Taylor 0.5 | 68.0 (-2.0; 1 of 2 seeds) |" in text
    assert "| 0.5 | digits, peak | 100 -> 50 | 1,000 -> 400 | 2.00 -> 1.00 |" in text
