"""Steps of the evidence on a fit that has no Trainer."""

import torch
from torch.nn.functional import cross_entropy

from lightning_unlearn.attribution import GRADIENT_X_ACTIVATION
from lightning_unlearn.attribution.layers import LayerPoint
from lightning_unlearn.evidence.eval_pass import ScoringPass, make_attributor
from lightning_unlearn.evidence.step_reader import TrainStepReader
from lightning_unlearn.evidence.training_dynamics import TrainingDynamics
from tests.fake_fit import FakeFit
from tests.toys import CLASSES, Blobs, mlp


def make_fit():
    torch.manual_seed(0)
    return FakeFit(mlp(), Blobs(60))


def test_a_pass_takes_every_sample_once():
    fit, data = make_fit(), Blobs(60)
    trajectory = TrainingDynamics(60, CLASSES)
    attributor = make_attributor(fit, LayerPoint("7", "input"), GRADIENT_X_ACTIVATION)
    share = ScoringPass(fit, attributor, trajectory, True, False, None).run()
    with torch.no_grad():
        logits = fit.model.eval()(data.x)
    torch.testing.assert_close(share["loss"], cross_entropy(logits, data.y, reduction="none"))
    assert share["prediction"].equal(logits.argmax(dim=1))
    assert share["label"].equal(data.y)
    # Gradient x activation of a logit at the head's input is that logit less the bias.
    rival = logits.scatter(1, data.y.unsqueeze(1), -torch.inf).argmax(dim=1)
    sums = logits - fit.model[7].bias.detach()
    expected = [
        sums[row, label] - sums[row, other] for row, (label, other) in enumerate(zip(data.y, rival, strict=True))
    ]
    torch.testing.assert_close(share["margin"], torch.stack(expected), atol=1e-4, rtol=1e-4)


class Sink:
    def __init__(self):
        self.rows = []

    def observe(self, index, logits, label):
        self.rows.append((index, logits, label))

    def forget(self):
        raise AssertionError("the reader gave up")


def test_training_steps_are_read():
    fit, sink = make_fit(), Sink()
    reader = TrainStepReader(task_format=fit.task_format, sink=sink)
    loader, seen = fit.train_loader, []
    fit.live_loaders = lambda: [loader]
    reader.start(fit, "7")
    reader.start_epoch(fit)
    iterator = iter(loader)
    fit.live_iterator = lambda: (iterator, 0)
    fit.model.train()
    for batch in iterator:
        reader.start_batch(fit, batch)
        logits = fit.model(batch[0])
        seen.append(logits.detach().clone())
        cross_entropy(logits, batch[1]).backward()
        reader.end_batch()
    assert reader.end_epoch(fit), reader.reason
    index, logits, label = (torch.cat(parts) for parts in zip(*sink.rows, strict=True))
    assert index.tolist() == list(range(60))
    assert logits.equal(torch.cat(seen))
    assert label.equal(Blobs(60).y)
    reader.detach()
    assert not fit.model[7]._forward_hooks
