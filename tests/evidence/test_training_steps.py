"""AttributionPartitionCallback on what the training steps show: the evidence, and that gathering it changes nothing."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from lightning_unlearn import AttributionPartitionCallback
from lightning_unlearn.evidence import collector as collector_module
from lightning_unlearn.evidence.collector import EvidenceCollector
from lightning_unlearn.partitioning import messages as messages_module
from tests.evidence.test_step_reader import BATCH, Coded, Net, mixup, two_calls
from tests.toys import Blobs, BlobsData, IndexRecorder, Toy, assert_same_weights, auroc, fit, mlp, trio, weights

AT = 3
SAYS_WHY = "Cannot collect label evidence from training steps"


class Keeps:
    """A recipe that keeps the evidence."""

    def __call__(self, evidence):
        self.evidence = evidence
        return (evidence.aum > 0).float()


class LastLogits(L.Callback):
    """The logits in eval mode when the epochs before the partition are over."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == AT - 1:
            self.before = weights(pl_module)


def small():
    """Without norms, whose statistics would be each rank's own."""
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4))


def last_logits(net, before, data):
    module = Toy(net).eval()
    module.load_state_dict(before)
    with torch.no_grad():
        return module(data.x), module.net[-1].bias


def margins(logits, label, bias=0.0):
    """Of the given label and the strongest other, each without its bias; one row at a time."""
    out = []
    for row, y in zip(logits.double(), label.tolist(), strict=True):
        rival = max((c for c in range(4) if c != y), key=lambda c: row[c].item())
        attributed = row - bias
        out.append(attributed[y] - attributed[rival])
    return torch.stack(out)


def assert_is_what_the_steps_showed(evidence, noted, last, bias, data):
    """Computes every number again, sample by sample.

    Args:
        evidence: what the recipe got.
        noted: by epoch, (index, logits) of all rows of all ranks.
        last: (N, 4), the logits of the last pass.
        bias: (4,), of the head.
        data: the training set.
    """
    found = {int(i): row for row, i in enumerate(evidence.index) if evidence.weight[row] > 0}
    assert evidence.label.equal(data.y[evidence.index])
    attributed = evidence.attribution @ evidence.basis.T
    last_margin = margins(last, data.y, bias.double())
    for i, row in found.items():
        of_epochs = [logits[index == i].double() for index, logits in noted[:AT]]
        # Quarters of training, counted in complete epochs.
        phases = [[e for e in range(AT) if e * 4 // AT == phase] for phase in range(4)]
        seen = [torch.cat([of_epochs[e] for e in phase]) for phase in phases if phase]
        means = [rows.mean(dim=0) if len(rows) else last[i].double() for rows in seen] + [last[i].double()]
        expected = torch.stack([mean - mean.mean() for mean in means])
        torch.testing.assert_close(attributed[row].double(), expected, rtol=1e-4, atol=1e-4)
        steps = torch.cat(of_epochs)
        margin = (
            torch.cat([margins(steps, data.y[i].repeat(len(steps))), last_margin[i : i + 1]])
            if len(steps)
            else (last_margin[i : i + 1])
        )
        everything = torch.cat([steps, last[i : i + 1].double()])
        entropy = torch.distributions.Categorical(logits=everything).entropy().mean()
        torch.testing.assert_close(evidence.margin[row].double(), last_margin[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(evidence.aum[row].double(), margin.mean(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            evidence.label_confidence[row].double(), margin.sigmoid().mean(), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(evidence.uncertainty[row].double(), entropy, rtol=1e-4, atol=1e-4)
    return set(found)


def rows_of(noted):
    """By epoch, (index, logits) of what a Net has noted."""
    return [tuple(torch.cat(parts) for parts in zip(*rows, strict=True))[:2] for rows in noted.values()]


LOADERS = {
    "shuffled": {"shuffle": True},
    "workers": {"shuffle": True, "num_workers": 2},
    "drop_last": {"shuffle": True, "drop_last": True},
    "drawn again": {"sampler": RandomSampler(range(101), replacement=True)},
}


@pytest.mark.parametrize("loader", LOADERS)
def test_evidence_is_what_the_training_steps_showed(loader):
    data, recipe, moment, module = Coded(), Keeps(), LastLogits(), Net(net=small)
    callback = AttributionPartitionCallback(at_epoch=AT, recipe=recipe)
    fit(module, DataLoader(data, batch_size=BATCH, **LOADERS[loader]), [callback, moment], max_epochs=AT + 1)
    logits, bias = last_logits(small, moment.before, data)
    noted = rows_of(module.noted)
    assert noted[0][0].tolist() != noted[1][0].tolist() != sorted(noted[1][0].tolist())
    assert len(assert_is_what_the_steps_showed(recipe.evidence, noted, logits, bias, data)) == 101
    torch.testing.assert_close(callback.partition.label_evidence, recipe.evidence.label_confidence)


@pytest.mark.parametrize("evidence", ["train_steps", "eval_passes"])
@pytest.mark.parametrize("prune", [{}, {"layer": "net.4"}], ids=["default", "named layer"])
@pytest.mark.parametrize(
    "loader",
    [{}, {"num_workers": 2, "persistent_workers": True}, {"by_epoch": True}, {"drop_last": True}],
    ids=["shuffled", "workers", "by epoch", "drop_last"],
)
def test_before_the_partition_all_three_leave_training_as_it_was(loader, prune, evidence):
    found = []
    for ours in ([], trio(AT, prune=prune, finetune={"mode": "layers", "lr": 0.01}, evidence_from=evidence)):
        data = BlobsData(Blobs(101), **loader)
        moment, record = LastLogits(), IndexRecorder(data.train)
        fit(Toy(lambda: mlp(0.3)), data, [*ours, moment, record], max_epochs=AT + 1)
        found.append((moment.before, [record.by_epoch[epoch] for epoch in range(AT)]))
    (plain, order), (with_ours, same_order) = found
    assert ours[2].is_active
    assert order == same_order
    # Shuffled anew in every epoch, also with the callbacks.
    assert order[0] != order[1] != sorted(order[1])
    assert_same_weights(plain, with_ours)


class MixesUp(Toy):
    """MixUp in the training step."""

    def training_step(self, batch):
        self.steps += 1
        return mixup(0.2)(self, *batch)


def test_mixup_is_noticed_said_once_and_passes_are_made_instead(monkeypatch):
    said, passes = [], []
    monkeypatch.setattr(collector_module, "rank_zero_info", said.append)

    pass_over = EvidenceCollector.pass_over

    def watched(collector, fit):
        passes.append(fit.epoch)
        return pass_over(collector, fit)

    monkeypatch.setattr(EvidenceCollector, "pass_over", watched)
    data = Blobs(400)
    callback = AttributionPartitionCallback(at_epoch=5)
    module = MixesUp()
    fit(module, BlobsData(data), [callback], max_epochs=6)
    (line,) = [text for text in said if text.startswith(SAYS_WHY)]
    assert "towards a class other than their label, as with MixUp and CutMix" in line
    assert "pass over the training set after every epoch instead." in line
    assert passes == [1, 2, 3, 4, 5]
    assert callback.partition.is_actionable
    assert auroc(callback.partition.clean_probability, ~data.wrong) > 0.97
    assert not any(part._forward_hooks for part in module.modules())


def test_without_a_fault_nothing_is_said_of_a_fallback(monkeypatch):
    said = []
    for module in (collector_module, messages_module):
        monkeypatch.setattr(module, "rank_zero_info", said.append)
    fit(Toy(), BlobsData(Blobs()), [AttributionPartitionCallback(at_epoch=2)], max_epochs=3)
    assert any(line.startswith("Partition after 2 epochs") for line in said)
    assert not any("Cannot collect label evidence" in line for line in said)


@pytest.mark.parametrize("step", [None, two_calls], ids=["reads", "fell back"])
def test_resuming_in_the_warm_up_gives_the_partition_of_an_uninterrupted_fit(tmp_path, step):
    def start(epochs, ckpt_path=None, callbacks=()):
        kept = Keeps()
        callback = AttributionPartitionCallback(at_epoch=AT, recipe=kept)
        loader = DataLoader(Coded(), batch_size=BATCH)  # in order, so that a resumed fit draws the same
        fit(
            Net(step, net=small),
            loader,
            [callback, *callbacks],
            ckpt_path=ckpt_path,
            max_epochs=epochs,
            enable_checkpointing=bool(callbacks),
        )
        return callback, kept

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, whole_kept = start(AT + 1, callbacks=[keep])
    reason = whole.collector.reader.reason
    assert ("2 times, not once" in reason) == (step is not None)
    for epoch in range(AT):
        path = tmp_path / f"epoch={epoch}.ckpt"
        states = torch.load(path, weights_only=True)["callbacks"]
        (state,) = (value for key, value in states.items() if "AttributionPartition" in key)
        assert state["partition"] is None
        assert state["reader"]["reason"] == reason
        # A fit that fell back makes its passes at the start of the next epoch.
        assert state["epochs_seen"] == list(range(1, epoch + 2 if step is None else epoch + 1))
        again, again_kept = start(AT + 1, path)
        assert again.collector.reader.reason == reason
        for name in ("attribution", "aum", "label_confidence", "uncertainty"):
            one, other = (getattr(kept.evidence, name) for kept in (again_kept, whole_kept))
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=f"{name} after epoch {epoch}")
        assert again.partition.is_clean.equal(whole.partition.is_clean)
