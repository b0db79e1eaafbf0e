"""Training that diverges after the partition never ends in silence."""

import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, SensitivityPruneCallback
from lightning_unlearn.partitioning.summary import Accuracies, summarize
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.divergence import LossWatch, not_finite
from tests.toys import Blobs, BlobsData, Toy, adamw, fit, mlp, sgd
from tests.toys import quick_trio as trio

AT = 2


def plain_mlp():
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4))


@pytest.mark.parametrize("lr", [math.nan, math.inf, -math.inf])
def test_rates_that_are_not_finite_are_refused_in_the_constructor(lr):
    with pytest.raises(ValueError, match="Expected lr to be "):
        CleanSubsetFinetuneCallback(lr=lr)


@pytest.mark.parametrize("net", [mlp, plain_mlp], ids=["batch norm", "no norm"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_huge_rate_ends_the_fit_with_the_epoch_and_what_to_do(tmp_path, net, optimizer):
    module, keep = Toy(net, optimizer=optimizer), ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    callbacks = [*trio(AT, finetune={"lr": 1e30}), keep, EarlyStopping("val_loss", check_finite=True)]
    said = re.escape(f"diverged in epoch {AT}, trained on the clean subset since epoch {AT}: the weights of 'net.0.")
    with pytest.raises(
        ValueError, match=said + r".* are NaN or infinite; use a smaller learning rate than lr=1e\+30 or"
    ):
        fit(module, BlobsData(Blobs()), callbacks, enable_checkpointing=True)
    # Nothing was written over.
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"epoch=0.ckpt", "epoch=1.ckpt"}


def test_a_rate_of_the_users_optimizer_that_is_not_finite_is_refused_when_it_is_made():
    make = partial(torch.optim.SGD, lr=math.nan)
    module = Toy()
    with pytest.raises(ValueError, match="finite learning rates, but got lr=nan"):
        fit(module, BlobsData(Blobs()), trio(AT, finetune={"optimizer": make}))
    assert all(weight.isfinite().all() for weight in module.parameters())


class Diverges(Toy):
    """Its loss, or its weights, are no numbers from an epoch on."""

    what = "loss"

    def training_step(self, batch):
        loss = super().training_step(batch)
        if self.current_epoch == AT + 1 and self.what == "loss":
            # Without a gradient, as where a user's own guard takes it out.
            return loss + torch.tensor(math.nan).detach()
        if self.current_epoch == AT + 1:
            with torch.no_grad():
                self.net[0].weight[0, 0] = math.nan
        return loss


class SeesOneBroken(Toy):
    """Leaves the step out where the loss is no number, which a batch norm has seen all the same."""

    def training_step(self, batch):
        if self.current_epoch == AT + 1:
            self.net(torch.full_like(batch[0], math.nan))
            return None
        return super().training_step(batch)


def test_statistics_of_a_norm_that_are_not_finite_end_the_fit():
    said = rf"diverged in epoch {AT + 1}, .*: the running statistics of 'net\.1' are NaN"
    with pytest.raises(ValueError, match=said):
        fit(SeesOneBroken(), BlobsData(Blobs()), trio(AT))


def test_a_loss_that_is_not_finite_is_spoken_of_where_the_weights_are():
    callbacks = trio(AT)
    with pytest.warns(UserWarning, match=f"The loss was NaN or infinite in epoch {AT + 1}, trained on the clean"):
        fit(Diverges(plain_mlp, optimizer=skips), BlobsData(Blobs()), callbacks)
    assert "diverged" not in callbacks[0].summary.advice


def skips(module):
    """An optimizer that leaves out steps whose gradients are not finite, as a GradScaler does."""
    optimizer = sgd(module)
    step = optimizer.step

    def careful(closure=None):
        loss = closure()
        if all(p.grad is None or p.grad.isfinite().all() for p in module.parameters()) and loss.isfinite():
            step()
        return loss

    optimizer.step = careful
    return optimizer


@pytest.mark.parametrize("others", [(), ("prune",)], ids=["the partition alone", "pruning"])
def test_without_fine_tuning_the_summary_says_so_and_claims_no_gain(others, monkeypatch):
    monkeypatch.setattr(Diverges, "what", "weights")
    callbacks = [AttributionPartitionCallback(at_epoch=AT), *(SensitivityPruneCallback() for _ in others)]
    with pytest.warns(UserWarning, match="has diverged since the partition: the weights of 'net.0.weight' are NaN"):
        fit(Diverges(), BlobsData(Blobs()), callbacks)
    summary = callbacks[0].summary
    assert "Training has diverged since, the weights of 'net.0.weight' are NaN or infinite: use a" in summary.advice
    assert summary.accuracy_after is None
    assert "Validation accuracy" not in summary.advice


def test_logits_that_overflow_are_never_right():
    """Of weights that are finite and huge."""

    class Overflows(Toy):
        def forward(self, x):
            logits = super().forward(x)
            return logits * math.inf if self.trainer.current_epoch > AT and not self.training else logits

    callbacks = trio(AT)
    fit(Overflows(), BlobsData(Blobs()), callbacks, limit_val_batches=1, max_epochs=4)
    assert callbacks[0].summary.accuracy_after == 0


def test_the_summary_in_words():
    callbacks = trio(AT)
    fit(Toy(), BlobsData(Blobs()), callbacks)
    facts = {"memorized": 0.9, "done": ("pruned 1 of 2 neurons",), "accuracy": Accuracies(0.5)}
    advice = summarize(callbacks[0].partition, **facts, diverged="the weights of 'fc'").advice
    assert (
        "Done: pruned 1 of 2 neurons. Training has diverged since, the weights of 'fc' are NaN or infinite: " in advice
    )


class Strategy:
    """Of two ranks, the other of which says what it is told to."""

    def __init__(self, other):
        self.other = other

    def reduce_boolean_decision(self, decision, all=True):
        return (decision and self.other) if all else (decision or self.other)


@pytest.mark.parametrize("other", [False, True])
def test_every_rank_hears_of_what_one_rank_finds(other):
    net = plain_mlp()
    context = FitContext(SimpleNamespace(strategy=Strategy(other)), net, None)
    assert not_finite(context) == ("weights on another rank" if other else "")
    watch = LossWatch()
    for loss in (torch.tensor(1.0), {"loss": torch.tensor(2.0)}, None):
        watch.add(loss)
    assert watch.was_finite(context) is other
    watch.add(torch.tensor(math.inf))
    assert not watch.was_finite(context)
    with torch.no_grad():
        net[2].bias[1] = -math.inf
    assert not_finite(context) == "the weights of '2.bias'"
