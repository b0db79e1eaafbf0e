"""Fields of a batch that are made of the label are re-labeled with it, and the loss is seen to follow."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, DataFormat
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.finetuning.companions import Companion, companions_in
from tests.evidence.test_label_field import Net, loader_of
from tests.toys import CLASSES, Blobs, finetune_callback, fit, weights

C = 5
Y = torch.arange(20) % 3
ORDER = torch.tensor([3, 0, 4, 1, 2])


def settled(outputs=C, label=Y, **kwargs):
    task_format = TaskFormat(DataFormat(**kwargs))
    task_format.infer_task(torch.zeros(len(label), outputs), label)
    return task_format


def smoothed(y, classes=C):
    return one_hot(y, classes) * 0.9 + 0.02


@pytest.mark.parametrize(
    ("made", "of_all"),
    [
        (smoothed(Y), smoothed(torch.arange(C))),
        (one_hot(Y, C), one_hot(torch.arange(C), C)),
        (Y + 1, torch.arange(C) + 1),
        (Y.float().unsqueeze(1), torch.arange(C)),
        (ORDER[Y], torch.where(torch.arange(C) < 3, ORDER.double(), torch.nan)),
    ],
    ids=["smoothed", "one-hot", "from 1 on", "floats", "other numbers"],
)
def test_what_is_made_of_the_label_is_found_with_the_rows_of_all_classes(made, of_all):
    (found,) = companions_in([{"x": torch.randn(20, C), "label": Y, "made": made}], settled())
    assert found.path == ("made",)
    torch.testing.assert_close(found.table, of_all.double().reshape(C, -1), equal_nan=True)


@pytest.mark.parametrize(
    "field",
    [
        torch.randint(0, 3, (20,), generator=torch.Generator().manual_seed(0)),
        Y // 2,
        torch.ones(20),
        torch.eye(3)[Y] @ torch.randn(3, 7),
        torch.arange(20),
    ],
    ids=["random", "coarser", "constant", "an embedding", "the index"],
)
def test_other_fields_are_left_alone(field):
    assert companions_in([{"x": torch.randn(20, 8), "label": Y, "other": field}], settled()) == []


def test_of_few_samples_by_chance_nothing_is_said():
    task_format = settled(label=torch.tensor([0, 1, 1]))
    batch = {"x": torch.randn(3, 2), "label": torch.tensor([0, 1, 1]), "flag": torch.tensor([1, 0, 0])}
    assert companions_in([batch], task_format) == []


def test_rows_of_new_labels_take_the_place_of_those_of_the_given_ones():
    one = Companion(("made",), smoothed(torch.arange(C)).double())
    new = torch.tensor([-1, 4, -1])
    found = one.replaced({"made": smoothed(Y[:3])}, smoothed(Y[:3]), Y[:3], new)
    torch.testing.assert_close(found, smoothed(torch.tensor([0, 4, 2])))


def test_a_row_that_is_not_made_of_the_label_after_all_is_an_error():
    one = Companion(("made",), smoothed(torch.arange(C)).double())
    with pytest.raises(
        RuntimeError, match=r"batch\['made'\], which is derived from the label, is not the same function"
    ):
        one.replaced({"made": smoothed(Y[:2])}, smoothed(Y[:2] + 1), Y[:2], torch.tensor([-1, 4]))
    unknown = Companion(
        ("made",), smoothed(torch.arange(C)).double().masked_fill(torch.eye(C)[4].bool()[:, None], torch.nan)
    )
    with pytest.raises(
        RuntimeError, match=r"is unknown for one of the classes, so a training batch cannot be re-labeled\. Use"
    ):
        unknown.replaced({"made": smoothed(Y[:2])}, smoothed(Y[:2]), Y[:2], torch.tensor([-1, 4]))


# In a fit


class Followed(Net):
    """Notes what the loss was of, once samples are re-labeled."""

    def __init__(self, loss, target):
        super().__init__(loss, optional=False)
        self.target, self.seen = target, []

    def on_train_batch_start(self, batch, batch_idx):
        if self.current_epoch >= 6:
            self.seen.append((batch["label"], self.target(batch)))


def relabeled(collate, loss, target):
    module = Followed(loss, target)
    finetune = finetune_callback(on_noisy="relabel", relabel_threshold=0.5)
    loader = loader_of(collate, Blobs(240))
    fit(module, loader, [AttributionPartitionCallback(at_epoch=6), finetune], max_epochs=8)
    assert len(finetune.training_subset.relabeled) > 20
    label, followed = (torch.cat(parts) for parts in zip(*module.seen, strict=True))
    return label, followed


FIELDS = {
    "smoothed": (
        lambda y: smoothed(y, CLASSES),
        lambda m, b: cross_entropy(m(b["x"]), b["made"]),
        lambda made: made.argmax(1),
    ),
    "one-hot": (
        lambda y: one_hot(y, CLASSES).float(),
        lambda m, b: binary_cross_entropy_with_logits(m(b["x"]), b["made"]),
        lambda made: made.argmax(1),
    ),
    "from 1 on": (lambda y: y + 1, lambda m, b: cross_entropy(m(b["x"]), b["made"] - 1), lambda made: made - 1),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_target_that_collate_makes_of_the_label_is_re_labeled_with_it(case):
    make, loss, label_of = FIELDS[case]
    label, followed = relabeled(
        lambda x, y: {"x": x, "label": y, "made": make(y)}, loss, lambda batch: label_of(batch["made"])
    )
    assert label.equal(followed)


def test_a_loss_that_does_not_follow_the_new_labels_ends_the_fit_before_a_step_with_them():
    # Not one to one, so that nothing shows it but the gradient.
    def collate(x, y):
        return {"x": x, "label": y, "soft": smoothed(y, CLASSES) + 0.01 * x[:, :CLASSES].abs()}

    module = Net(lambda net, batch: cross_entropy(net(batch["x"]), batch["soft"]), optional=False)
    ours = [AttributionPartitionCallback(at_epoch=6), CleanSubsetFinetuneCallback(on_noisy="relabel")]
    alone = Net(module.loss, optional=False)
    fit(alone, loader_of(collate, Blobs(240), 240), max_epochs=6)
    match = (
        "follow the new labels of re-labeled samples, but in .* training_step reads labels from elsewhere; use on_noisy"
    )
    with pytest.raises(RuntimeError, match=match):
        fit(module, loader_of(collate, Blobs(240), 240), ours, max_epochs=8)
    assert all(one.equal(other) for one, other in zip(weights(module).values(), weights(alone).values(), strict=True))
