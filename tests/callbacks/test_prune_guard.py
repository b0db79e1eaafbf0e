import re

import lightning as L
import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_unlearn import SensitivityPruneCallback
from lightning_unlearn.pruning import guard as guard_module
from lightning_unlearn.pruning import messages
from lightning_unlearn.pruning import run as run_module
from lightning_unlearn.pruning.criteria import Sensitivity
from lightning_unlearn.pruning.guard import ScoreMonitor, held_back
from lightning_unlearn.trainer.validation import Score
from tests.callbacks.published import ANTI, FLAG, IDLE, Planted, PlantedData, Published, make_partition
from tests.toys import fit, weights

NONE = torch.zeros(0, dtype=torch.int64)


@pytest.fixture
def said(monkeypatch):
    lines = []
    for module in (messages, run_module):
        monkeypatch.setattr(module, "rank_zero_info", lines.append)
    return lines


def run(data, probability, callbacks=(), dry=False, module=None, **arguments):
    module = module or Planted()
    callback = SensitivityPruneCallback("fc", **{"amount": 0.5, **arguments})
    published = Published(make_partition(probability, data.y), dry_run=dry)
    fit(module, data, [callback, published, *callbacks], max_epochs=3)
    return module, callback


def test_only_the_neuron_that_carries_the_noise_is_pruned(said):
    data = PlantedData()
    module, callback = run(data, data.probability())
    # Half of seven live neurons were allowed.
    assert callback.mask.pruned_indices().tolist() == [FLAG]
    assert callback.sensitivity[FLAG] < -0.4 < 0.4 < callback.sensitivity[ANTI]
    assert (callback.mask.standard_error[:7] < 0.05).all()
    assert callback.mask.standard_error[7] == torch.inf
    assert (module.fc.weight[FLAG] == 0).all()
    assert (module.fc.weight[IDLE] != 0).any()
    assert said == [
        "1 of 7 active neurons in 'fc' are candidates (sensitivity); pruning up to 1 (amount=0.5).",
        "Pruned 1 of 8 neurons of 'fc' (validation accuracy went from 1.000 to 1.000).",
    ]
    assert callback.summary_clause() == "pruned 1 of 8 neurons of 'fc' (validation accuracy went from 1.000 to 1.000)"


def class_zero_is_suspect(data):
    """Neuron 0, which tells the first class, goes with noise as the flag does, only less."""
    probability = data.probability()
    of_first = data.x[:, 0] > 1.5
    return torch.where(of_first & ~data.wrong, 0.6 * probability, probability)


def test_a_step_that_hurts_is_rolled_back(said):
    data = PlantedData()
    module, callback = run(data, class_zero_is_suspect(data))
    found = callback.mask
    # Both are significant, and the flag is the worse.
    assert found.sensitivity[FLAG] < found.sensitivity[0] < -0.1
    assert found.pruned_indices().tolist() == [FLAG]
    assert (module.fc.weight[0] == Planted().fc.weight[0]).all()
    assert "1 of 2 proposed were rolled back: validation accuracy fell from 1.000 to ." in callback.summary_clause()
    assert any("pruning up to 2" in line for line in said)


def test_without_a_guard_it_stays():
    data = PlantedData()
    module, callback = run(data, class_zero_is_suspect(data), max_val_drop=None)
    assert callback.mask.pruned_indices().tolist() == [0, FLAG]
    assert (module.fc.weight[[0, FLAG]] == 0).all()
    assert callback.summary_clause() == "pruned 2 of 8 neurons of 'fc'"


def test_a_tolerance_that_is_large_lets_it_pass():
    data = PlantedData()
    _, callback = run(data, class_zero_is_suspect(data), max_val_drop=0.5)
    assert callback.mask.pruned_indices().tolist() == [0, FLAG]


def test_where_the_first_step_hurts_nothing_is_pruned_and_the_weights_are_as_they_were(monkeypatch):
    monkeypatch.setattr(guard_module, "STEPS", 1)
    data = PlantedData()
    module, callback = run(data, class_zero_is_suspect(data))
    assert callback.mask.keep.all()
    before = weights(Planted())
    assert all(value.equal(before[name]) for name, value in weights(module).items())
    assert callback.summary_clause().startswith(
        "pruned 0 of 8 neurons of 'fc' (2 of 2 proposed were rolled back: validation"
    )


class Raises(Exception):
    pass


def test_an_error_in_the_middle_leaves_the_weights_as_they_were(monkeypatch):
    data, module, scores = PlantedData(), Planted(), []

    def fails(*_):
        scores.append(1)
        if len(scores) == 3:
            assert (module.fc.weight[[0, FLAG]] == 0).all()  # two steps are done
            raise Raises
        return Score(1.0, 0.1, 10)

    monkeypatch.setattr(guard_module, "score_validation", fails)
    with pytest.raises(Raises):
        run(data, class_zero_is_suspect(data), module=module)
    assert module.fc.weight.equal(Planted().fc.weight)
    assert module.fc.bias.equal(Planted().fc.bias)


def test_as_many_scores_are_taken_as_steps_are_said(monkeypatch):
    data, taken = PlantedData(), []
    monkeypatch.setattr(guard_module, "score_validation", lambda *_: taken.append(1) or Score(1.0, 0.1, 10))
    run(data, data.probability(), criterion="random", amount=0.72)
    assert len(taken) == 1 + guard_module.STEPS
    taken.clear()
    # One neuron is one step.
    run(data, data.probability(), amount=0.15)
    assert len(taken) == 1 + 1


def test_where_no_neuron_is_proposed_held_back_samples_are_not_scored(monkeypatch):
    taken = []
    monkeypatch.setattr(guard_module, "score_samples", lambda *_: taken.append(1) or Score(1.0, 0.1, 10))
    data = PlantedData(validation=False)
    run(data, data.probability(), amount=0.15)
    assert len(taken) == 2
    taken.clear()
    _, prune = run(data, data.probability(), amount=0.15, criterion=Sensitivity(fdr_level=1e-300))
    assert len(taken) == 0
    assert prune.mask.keep.all()


def losses(module, data, index):
    with torch.no_grad():
        return cross_entropy(module(data.x[index]), data.y[index]).item()


def test_without_validation_data_held_back_samples_decide(said):
    data = PlantedData(validation=False)
    probability = class_zero_is_suspect(data)
    held = held_back(make_partition(probability, data.y))
    _, callback = run(data, probability)
    assert callback.mask.pruned_indices().tolist() == [FLAG]
    damaged = Planted()
    with torch.no_grad():
        damaged.fc.weight[[0, FLAG]] = 0
    before, after = losses(Planted(), data, held), losses(damaged, data, held)
    assert after > before + 0.01
    assert (
        f"1 of 2 proposed were rolled back: loss on held-back clean samples rose from {before:.3f} to {after:.3f}"
        in callback.summary_clause()
    )


def test_held_back_samples_are_left_out_of_the_regression():
    data = PlantedData(validation=False)
    probability = data.probability()
    held = held_back(make_partition(probability, data.y))
    _, callback = run(data, probability, criterion=Sensitivity(l2_penalty=0.0))
    used = torch.ones(len(data.y), dtype=torch.bool)
    used[held] = False
    x, y = data.x[used, :7].double(), probability[used].double()
    x, y = ((v - v.mean(dim=0)) / v.std(dim=0, correction=0) for v in (x, y))
    expected = torch.linalg.lstsq(x, y.unsqueeze(1)).solution[:, 0]
    torch.testing.assert_close(callback.sensitivity[:7], expected.float(), rtol=1e-4, atol=1e-5)
    # With validation data, all samples are used.
    _, all_of_them = run(PlantedData(), probability, criterion=Sensitivity(l2_penalty=0.0))
    assert not torch.allclose(all_of_them.sensitivity, callback.sensitivity, rtol=1e-4)


def test_a_tenth_of_the_likeliest_of_each_class_is_held_back():
    label = torch.arange(300) % 3
    probability = torch.rand(300, generator=torch.Generator().manual_seed(0))
    held = held_back(make_partition(probability, label))
    for c in range(3):
        members = ((label == c) & (probability >= 0.5)).nonzero().flatten()
        mine = held[label[held] == c]
        assert len(mine) == int(0.1 * len(members))
        rest = members[~torch.isin(members, mine)]
        assert probability[mine].min() >= probability[rest].max()


def test_not_more_than_two_thousand_are_held_back():
    label = torch.arange(60000) % 10
    held = held_back(make_partition(torch.ones(60000), label))
    assert len(held) == 2000
    assert label[held].bincount().tolist() == [200] * 10
    few = held_back(make_partition(torch.tensor([0.9, 0.1, 0.8, 0.2, 0.9]), torch.tensor([0, 0, 1, 1, 1])))
    assert few.tolist() == [0, 4]  # one of each class at least


@pytest.mark.parametrize(
    ("held", "after", "worse"),
    [
        (False, (0.79, 9.0), False),  # a fall of the tolerance itself, whatever rounding makes of it
        (False, (0.7899, 0.1), True),
        (False, (0.9, float("nan")), False),
        (True, (0.1, 0.51), False),
        (True, (0.9, 0.5101), True),
        (True, (0.9, float("nan")), True),
        (True, (0.1, 0.3), False),
    ],
)
def test_what_counts_as_worse(held, after, worse):
    gauge = ScoreMonitor(Score(0.8, 0.5, 100), lambda: None, torch.ones(3) if held else NONE, 0.01)
    assert gauge.is_worse(Score(*after, 100)) is worse
    assert gauge.is_worse(None)
    assert gauge.between(None) == "the score could no longer be computed"


def test_several_layers_are_pruned_in_common_steps():
    class Deep(Planted):
        def __init__(self):
            super().__init__()
            self.fc2 = torch.nn.Linear(8, 8)
            with torch.no_grad():
                self.fc2.weight.copy_(torch.eye(8))
                self.fc2.bias.zero_()

        def forward(self, x):
            return self.head(self.fc2(self.fc(x).relu()).relu())

    data, module = PlantedData(), Deep()
    callback = SensitivityPruneCallback(["fc2", "fc"], amount=0.5)
    fit(module, data, [callback, Published(make_partition(class_zero_is_suspect(data), data.y))], max_epochs=2)
    # In the order of the calls, not of the names.
    assert [mask.layer for mask in callback.masks] == ["fc", "fc2"]
    assert [mask.pruned_indices().tolist() for mask in callback.masks] == [[FLAG], [FLAG]]
    assert callback.target_layer() == "fc"
    assert (module.fc.weight[FLAG] == 0).all()
    assert (module.fc2.weight[FLAG] == 0).all()
    with pytest.raises(RuntimeError, match=r"There are 2 masks, for layers 'fc', 'fc2': use .masks"):
        _ = callback.mask
    expected = r"pruned 1 of 8 neurons of 'fc' and 1 of 8 neurons of 'fc2' \(2 of 4 proposed were rolled back"
    assert re.match(expected, callback.summary_clause())


def test_where_no_neuron_is_significant_none_is_pruned_and_one_line_says_so(said, recwarn):
    data = PlantedData()
    unrelated = torch.rand(400, generator=torch.Generator().manual_seed(5))
    module, callback = run(data, unrelated)
    assert callback.mask.keep.all()
    assert said == [
        "No neurons pruned in 'fc': none of 7 active neurons is significantly more active on noisy samples (FDR 0.05)."
    ]
    assert not [warning for warning in recwarn if "No neurons" in str(warning.message)]
    assert callback.summary_clause() == ""
    before = weights(Planted())
    assert all(value.equal(before[name]) for name, value in weights(module).items())


def test_nothing_is_measured_where_nothing_is_proposed(monkeypatch):
    data, taken = PlantedData(), []
    monkeypatch.setattr(guard_module, "score_validation", lambda *_: taken.append(1) or Score(1.0, 0.1, 10))
    run(data, torch.rand(400, generator=torch.Generator().manual_seed(5)))
    assert len(taken) == 1


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("lr", [0.0, 0.05])
def test_a_dry_run_changes_nothing_and_says_what_it_would_do(validation, lr, said):
    data, final = PlantedData(validation=validation), []
    for with_callback in (False, True):
        module = Planted(lr=lr)
        published = Published(make_partition(class_zero_is_suspect(data), data.y), dry_run=True)
        callback = SensitivityPruneCallback("fc", amount=0.5, criterion=Sensitivity(fdr_level=None))
        fit(module, data, [published, *([callback] if with_callback else [])], max_epochs=3)
        final.append(weights(module))
    assert all(final[0][name].equal(final[1][name]) for name in final[0])
    assert len(callback.mask.pruned_indices()) >= 1
    assert callback.summary_clause().startswith("would prune ")
    assert said[-1] == f"Dry run: {callback.summary_clause()}."
    assert callback.get_mask(L.Trainer(accelerator="cpu", logger=False), module) is None


def test_a_dry_run_stays_one_after_a_resume(tmp_path):
    data = PlantedData()
    probability = class_zero_is_suspect(data)

    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "dry.ckpt")

    _, callback = run(data, probability, callbacks=[Saves()], dry=True, module=Planted(lr=0.05), max_val_drop=None)
    module, again = Planted(lr=0.05), SensitivityPruneCallback("fc", amount=0.5, max_val_drop=None)
    published = Published(make_partition(probability, data.y), dry_run=True)
    fit(module, data, [again, published], max_epochs=4, ckpt_path=tmp_path / "dry.ckpt")
    assert again.mask.keep.equal(callback.mask.keep)
    assert len(again.mask.pruned_indices()) == 2
    assert (module.fc.weight[again.mask.pruned_indices()] != 0).any(dim=1).all()
    assert again.summary_clause().startswith("would prune 2")
