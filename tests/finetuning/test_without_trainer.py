"""Steps of fine-tuning on a fit that has no Trainer."""

import torch
from lightning.pytorch.callbacks import BackboneFinetuning

from lightning_unlearn.finetuning.freezing import FrozenLayers
from lightning_unlearn.finetuning.shrink_weights import KEPT
from lightning_unlearn.finetuning.starting import Starting
from tests.fake_fit import FakeFit
from tests.toys import Blobs, mlp


def test_layers_are_frozen_and_thawed():
    fit, frozen = FakeFit(mlp(), Blobs(40)), FrozenLayers()
    fit.model.train()
    trace, _ = fit.probe()
    frozen.choose_before(fit.model, trace, "4")
    frozen.freeze(fit)
    trained = {name for name, parameter in fit.model.named_parameters() if parameter.requires_grad}
    assert trained == {"4.weight", "4.bias", "5.weight", "5.bias", "7.weight", "7.bias"}
    assert not fit.model[1].training
    assert fit.model[5].training
    frozen.thaw()
    assert all(parameter.requires_grad for parameter in fit.model.parameters())
    assert all(module.training for module in fit.model.modules())


def test_weights_move_towards_those_of_the_start_and_back():
    fit, starting = FakeFit(mlp(), Blobs(40), memorized=0.9), Starting("auto")
    first = fit.model[0].weight.detach().clone()
    starting.remember(fit, 0, is_wanted=True)
    with torch.no_grad():
        fit.model[0].weight.add_(1.0)
    fit.step = 5
    trained = fit.model[0].weight.detach().clone()
    start = starting.choose(fit)
    assert start.how == "shrink"
    undoing = []
    assert starting.move(fit, start.how, [], None, undoing) == first.numel()
    torch.testing.assert_close(fit.model[0].weight.detach(), first + KEPT * (trained - first))
    for undo in undoing:
        undo()
    assert fit.model[0].weight.equal(trained)


def test_they_stay_where_nothing_was_memorized_or_another_callback_sees_to_the_optimizer():
    fit, starting = FakeFit(mlp(), Blobs(40), memorized=0.1), Starting("auto")
    starting.remember(fit, 0, is_wanted=True)
    assert starting.choose(fit).how == "keep"
    fit.source.memorized, fit.callbacks = 0.9, [BackboneFinetuning()]
    assert "BackboneFinetuning manages the current optimizer" in starting.choose(fit).because
