"""Rows of a batch that are not the samples drawn: refused before the first step, or noticed; never acted upon."""

import random
from contextlib import nullcontext

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback
from lightning_unlearn.data.fingerprint import sampled_indices
from lightning_unlearn.data.row_order import Rows
from lightning_unlearn.trainer.context import FitContext
from lightning_unlearn.trainer.rank_checks import check_ranks
from tests.callbacks.test_relabel import Noting
from tests.toys import CLASSES, Blobs, BlobsData, Toy, auroc, fit
from tests.toys import quick_trio as trio

AT = 2
EXPECTED = "Expected the rows of a batch to be the samples that were drawn for it, in that order, but"


class Fetched(Blobs):
    """A data set that serves whole batches, as h5py likes them."""

    def __init__(self, order, **kwargs):
        super().__init__(**kwargs)
        self.order = order

    def __getitems__(self, indices):
        return [self[index] for index in self.order(indices)]


class Guessing(Blobs):
    """Serves any other sample for those that it cannot read."""

    def __getitem__(self, index):
        return super().__getitem__(random.randrange(len(self)) if index % 20 == 5 else index)


def within_its_class(samples):
    """Moves samples only among those of the same label."""
    moved = list(samples)
    for label in range(CLASSES):
        places = [place for place, (_, y) in enumerate(samples) if y == label]
        for place, other in zip(places, [*places[1:], *places[:1]], strict=True):
            moved[place] = samples[other]
    return moved


ORDERS = {
    "sorted by content": lambda samples: sorted(samples, key=lambda sample: sample[0].sum().item()),
    "sorted by label": lambda samples: sorted(samples, key=lambda sample: sample[1].item()),
    "turned round": lambda samples: samples[::-1],
    "shifted": lambda samples: [*samples[1:], samples[0]],
    "shuffled": lambda samples: random.sample(samples, len(samples)),
    "one in another's place": lambda samples: [*samples[:-1], samples[0]],
    "within its class": within_its_class,
}


def collating(order, **kwargs):
    return DataLoader(Blobs(**kwargs), 16, shuffle=True, collate_fn=lambda samples: default_collate(order(samples)))


class Turning(DataLoader):
    def __iter__(self):
        return ((x.flip(0), y.flip(0)) for x, y in super().__iter__())


class Hooked(BlobsData):
    """Its transfer hook turns batches round, always or only in training."""

    def __init__(self, always, **kwargs):
        super().__init__(Blobs(), **kwargs)
        self.always = always

    def on_after_batch_transfer(self, batch, dataloader_idx):
        turns = self.always or self.trainer.training
        return [part.flip(0) for part in batch] if turns else batch


COLLATE = r"collate_fn \(collating.<locals>.<lambda>\) puts"
REFUSED = {
    **{name: (lambda order=order: collating(order), COLLATE) for name, order in ORDERS.items()},
    "under augmentation": (lambda: collating(within_its_class, augment="torch"), COLLATE),
    "batches of two": (lambda: DataLoader(Blobs(40), 2, collate_fn=lambda s: default_collate(s[::-1])), "collate_fn"),
    "a batch of all": (lambda: DataLoader(Blobs(), 512, collate_fn=lambda s: default_collate(s[::-1])), "collate_fn"),
    "in workers": (
        lambda: DataLoader(Blobs(), 16, num_workers=2, collate_fn=lambda s: default_collate(s[::-1])),
        "collate_fn",
    ),
    "__getitems__ that sorts": (lambda: DataLoader(Fetched(sorted), 16, shuffle=True), r"Fetched.__getitems__ puts"),
    "__getitems__ that turns round": (lambda: DataLoader(Fetched(reversed), 16), r"Fetched.__getitems__ puts"),
    "__getitems__ under augmentation": (
        lambda: DataLoader(Fetched(sorted, augment="numpy"), 16, shuffle=True),
        r"Fetched.__getitems__ puts",
    ),
    "any other sample": (lambda: DataLoader(Guessing(), 16, shuffle=True), r"Guessing.__getitem__ puts"),
    "any other sample of a subset": (
        lambda: DataLoader(Subset(Guessing(), range(203)), 16, shuffle=True),
        r"Subset.__getitem__ puts",
    ),
    "a transfer hook": (lambda: Hooked(always=True), r"a transfer hook \(on_before_batch_transfer, on_after_"),
    "a loader": (lambda: Turning(Blobs(), 16), "Turning.__iter__ puts"),
}


@pytest.mark.parametrize(
    "settings", [{}, {"evidence_from": "eval_passes"}, {"finetune": {"on_noisy": "relabel"}}], ids=str
)
@pytest.mark.parametrize("name", REFUSED)
def test_other_rows_than_those_drawn_are_refused_before_the_first_step_with_who_is_to_blame(name, settings):
    make, culprit = REFUSED[name]
    module, loader = Toy(), make()
    before = dict(vars(loader)) if isinstance(loader, DataLoader) else None
    with pytest.raises(TypeError, match=f"{EXPECTED} {culprit}"):
        fit(module, loader, trio(AT, **settings))
    assert module.steps == 0
    assert before is None or {**vars(loader), "_iterator": None} == {**before, "_iterator": None}


class WithPlaces(Toy):
    def training_step(self, batch):
        return super().training_step((batch["x"], batch["y"]))


def with_places(samples):
    x, y = default_collate(samples)
    return {"x": x, "place": torch.arange(len(y)), "y": y}


def without_norms():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES))


class Nested(Toy):
    """Takes what is sparse, or of rows of different length."""

    def forward(self, x):
        return super().forward(x.to_padded_tensor(0.0, (x.size(0), 16)) if x.is_nested else x.to_dense())


def sparse(samples):
    x, y = default_collate(samples)
    return x.to_sparse(), y


def nested(samples):
    return torch.nested.nested_tensor([x[: 8 + y] for x, y in samples]), torch.stack([y for _, y in samples])


KEPT = {
    "sparse": (lambda: DataLoader(Blobs(), 16, shuffle=True, collate_fn=sparse), Nested),
    "nested": (lambda: DataLoader(Blobs(), 16, shuffle=True, collate_fn=nested), Nested),
    "augmentation": (lambda: DataLoader(Blobs(augment="torch"), 16, shuffle=True), Toy),
    "numbers of places": (lambda: DataLoader(Blobs(), 16, shuffle=True, collate_fn=with_places), WithPlaces),
    "__getitems__ in order": (lambda: DataLoader(Fetched(list, augment="torch"), 16, shuffle=True), Toy),
    "one by one": (lambda: DataLoader(Blobs(40), 1, shuffle=True), lambda: Toy(without_norms)),
    "as large as can be": (lambda: DataLoader(Blobs(), 203, shuffle=True), Toy),
}


@pytest.mark.parametrize("name", KEPT)
def test_rows_in_their_order_are_read(name):
    make, module = KEPT[name]
    loader, partition = make(), trio(AT)[0]
    fit(module(), loader, [partition], max_epochs=AT + 1)
    assert partition.collector.reader.reason == ""
    assert partition.collector.epochs_seen == [1, 2]
    assert partition.partition.label.equal(loader.dataset.y)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_hook_that_reorders_only_in_training_is_noticed_in_the_first_epoch(shuffle):
    data = Hooked(always=False, shuffle=shuffle)
    partition = AttributionPartitionCallback(at_epoch=1, dry_run=True)
    fit(Toy(), data, [partition], max_epochs=3)
    assert "for example because collate_fn or a transfer hook reorders a batch" in partition.collector.reader.reason
    assert auroc(1 - partition.partition.clean_probability, data.train.wrong) > 0.9


FIRST = Blobs().x[int(sampled_indices(203)[1])]
NUMBERS = {
    "one row more": (lambda samples: [*samples, samples[0]], "of 16 samples collate_fn .* makes 17 rows"),
    "a sample of the first ones less": (
        lambda samples: [sample for sample in samples if not sample[0].equal(FIRST)],
        "of 16 samples collate_fn .* makes 15 rows",
    ),
    "in eights": (lambda samples: samples[: len(samples) // 8 * 8], "of 11 samples collate_fn .* makes 8 rows"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_another_number_of_rows_is_refused_before_the_first_step_also_of_the_last_batch(name):
    change, message = NUMBERS[name]
    module = Toy()
    with pytest.raises(TypeError, match=f"Expected a batch with one row for each sample drawn, but {message}"):
        fit(module, collating(change), trio(AT))
    assert module.steps == 0


class Offering(BlobsData):
    """Sorts in training, and offers a loader that does not."""

    def train_dataloader(self):
        order = ORDERS["sorted by content"]
        return DataLoader(self.train, 16, shuffle=True, collate_fn=lambda s: default_collate(order(s)))

    def attribution_dataloader(self):
        return DataLoader(self.train, 32)


def test_where_a_loader_is_offered_that_keeps_the_order_it_is_gone_by():
    data, partition = Offering(Blobs()), trio(AT)[0]
    fit(Toy(), data, [partition, CleanSubsetFinetuneCallback()])
    assert EXPECTED in partition.collector.reader.reason
    assert auroc(1 - partition.partition.clean_probability, data.train.wrong) > 0.95


def test_what_is_sorted_in_training_is_not_relabeled():
    module, ours = Toy(), trio(AT, finetune={"on_noisy": "relabel"})
    with pytest.raises(TypeError, match=EXPECTED):
        fit(module, Offering(Blobs()), ours)
    assert module.steps == 0


def test_a_loader_that_is_made_again_is_looked_at_again():
    class Later(BlobsData):
        def train_dataloader(self):
            turns = self.trainer.current_epoch > 0
            collate = (lambda samples: default_collate(samples[::-1])) if turns else default_collate
            return DataLoader(self.train, 16, shuffle=True, collate_fn=collate)

    module = Toy()
    with pytest.raises(TypeError, match=EXPECTED):
        fit(module, Later(Blobs()), trio(AT), reload_dataloaders_every_n_epochs=1)
    assert module.steps_by_epoch == {0: 13}


# Items that are None


class Gaps(Dataset):
    """Some items cannot be read."""

    def __init__(self, gone):
        self.blobs, self.gone = Blobs(), gone
        self.x, self.y = self.blobs.x, self.blobs.y

    def __len__(self):
        return len(self.blobs)

    def __getitem__(self, index):
        return None if index in self.gone else self.blobs[index]


def leaves_out(samples):
    return default_collate([sample for sample in samples if sample is not None])


def fills_up(samples):
    there = [sample for sample in samples if sample is not None]
    return default_collate((there + there)[: len(samples)])


def replaces(samples):
    there = [sample for sample in samples if sample is not None]
    return default_collate([there[0] if sample is None else sample for sample in samples])


FEW, MANY = (3, 50, 51, 77, 110, 150, 180), tuple(range(32, 70))


def said(monkeypatch):
    lines = []
    monkeypatch.setattr("lightning_unlearn.partitioning.messages.rank_zero_info", lines.append)
    return lines


@pytest.mark.parametrize("collate", [leaves_out, fills_up, replaces])
@pytest.mark.parametrize("gone", [FEW, MANY], ids=["few", "many"])
def test_items_that_are_none_are_not_judged_and_the_others_keep_their_rows(monkeypatch, collate, gone):
    data, partition = Gaps(gone), trio(AT)[0]
    lines = said(monkeypatch)
    fit(Toy(), DataLoader(data, 16, shuffle=True, collate_fn=collate), [partition, CleanSubsetFinetuneCallback()])
    found, there = partition.partition, torch.ones(len(data), dtype=torch.bool)
    there[list(gone)] = False
    assert found.label.equal(torch.where(there, data.y, -1))
    assert found.is_clean[~there].all()
    assert auroc(1 - found.clean_probability[there], data.blobs.wrong[there]) > 0.95
    assert [line for line in lines if line.startswith(f"{len(gone)} of 203 training samples are None in the dataset")]


@pytest.mark.parametrize("collate", [leaves_out, replaces])
def test_others_are_relabeled_where_items_are_none(collate):
    data = Gaps(FEW)
    module, ours = Noting(data.blobs), trio(AT, finetune={"on_noisy": "relabel"})
    fit(module, DataLoader(data, 16, shuffle=True, collate_fn=collate), ours)
    new = ours[2].training_subset.new_label
    assert (new >= 0).sum() > 20
    for index, labels in module.trained[AT].items():
        expected = (new if new[index] >= 0 else data.y)[index].item()
        # What is put in the place of an item that is None stays as it is.
        assert expected in labels
        assert collate is replaces or set(labels) == {expected}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_where_a_batch_is_filled_up_suspects_are_dropped_instead_of_relabeled():
    data = Gaps(FEW)
    module, ours = Noting(data.blobs), trio(AT, finetune={"on_noisy": "relabel"})
    with pytest.warns(
        UserWarning, match="Suspects are dropped instead of re-labeled. .* for example because collate_fn pads"
    ):
        fit(module, DataLoader(data, 16, shuffle=True, collate_fn=fills_up), ours)
    assert ours[2].training_subset.new_label is None
    for index, labels in module.trained[AT].items():
        assert set(labels) == {data.y[index].item()}


class Changes(L.Callback):
    """Labels of the data set that somebody changes after the partition."""

    def __init__(self, data):
        self.data = data

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == AT + 1:
            self.data.y = (self.data.y + 1) % CLASSES


def test_no_label_is_written_on_a_row_that_has_not_the_label_of_its_index():
    data = Blobs()
    ours = trio(AT, finetune={"on_noisy": "relabel"})
    module = Toy()
    with pytest.raises(ValueError, match="labels of the partition at their dataset indices, but 16 of 16 differ"):
        fit(module, DataLoader(data, 16, shuffle=True), [*ours, Changes(data)])
    assert AT + 1 not in module.steps_by_epoch


class TwoRanks:
    """What a Trainer knows of the other rank, of which this is the first."""

    world_size, root_device = 2, torch.device("cpu")

    def __init__(self, first):
        self.strategy = self
        self.first = first

    def broadcast(self, _):
        return self.first

    def reduce(self, tensor, reduce_op):
        return tensor


@pytest.mark.parametrize(("label", "refused"), [(1, False), (2, True)])
def test_ranks_that_looked_at_other_samples_are_compared_by_those_they_share(label, refused):
    context = FitContext(TwoRanks((40, "", {0: (1,), 5: (1,)})), None, None)
    here = Rows(torch.tensor([5, 7]), torch.tensor([[label], [3]]), {})
    with pytest.raises(ValueError, match="different labels at the same indices") if refused else nullcontext():
        check_ranks(context, 40, "", here)
