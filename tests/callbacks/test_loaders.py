"""Loaders as users write them: narrowed to the clean subset in the way that they draw, or refused before a step."""

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_unlearn import CleanSubsetFinetuneCallback
from lightning_unlearn.data.sampling_scheme import scheme_of
from lightning_unlearn.data.subset_sampler import CleanSubsetSampler
from tests.callbacks.test_relabel import Noting
from tests.data.test_loaders import Ahead, Elsewhere, OneForEver, Pairwise
from tests.toys import Blobs, IndexRecorder, Toy, auroc, fit, partition_callback
from tests.toys import quick_trio as trio

N, AT = 203, 2


class ByClass(WeightedRandomSampler):
    """As users write it: each class as often as the others."""

    def __init__(self, data, number):
        count = torch.bincount(data.y)
        super().__init__(1.0 / count[data.y], number)


def never(data):
    """A third of the samples are held back by the weights."""
    weight = torch.ones(len(data))
    weight[: N // 3] = 0
    return weight


# name -> sampler, from the data; all of them are 203 draws or fewer.
SAMPLERS = {
    "weighted": lambda data: WeightedRandomSampler(torch.rand(N, generator=torch.Generator().manual_seed(5)) + 0.1, N),
    "weighted by class": lambda data: ByClass(data, 160),
    "weights of zero": lambda data: WeightedRandomSampler(never(data), N),
    "weighted without replacement": lambda data: WeightedRandomSampler(never(data) + 0.5, 100, replacement=False),
    "with replacement": lambda data: RandomSampler(data, replacement=True),
    "fewer than there are": lambda data: RandomSampler(data, num_samples=120),
    "subset": lambda data: SubsetRandomSampler(range(40, N)),
    "batch sampler": lambda data: BatchSampler(WeightedRandomSampler(never(data), N), 16, drop_last=True),
}


def loader_of(name, data, **kwargs):
    sampler = SAMPLERS[name](data)
    if isinstance(sampler, BatchSampler):
        return DataLoader(data, batch_sampler=sampler, **kwargs)
    return DataLoader(data, batch_size=16, sampler=sampler, **kwargs)


def expected(loader, partition, epoch, **kwargs):
    """What is drawn in an epoch after the partition, from the sampler that the user gave."""
    scheme = scheme_of(loader.batch_sampler.sampler).restricted_to(partition.clean_indices(), at_least=16, **kwargs)
    sampler = CleanSubsetSampler(scheme, num_replicas=1, rank=0, seed=0, leave_no_single=16)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    return drawn[: len(drawn) // 16 * 16] if loader.batch_sampler.drop_last else drawn


# How else a loader may be made; name -> from the data.


class Flavoured(DataLoader):
    """A subclass with an ``__init__`` of its own."""

    def __init__(self, data, *, flavour):
        super().__init__(data, batch_size=16, shuffle=True)
        self.flavour = flavour


class OfTensors(BatchSampler):
    """Pools of batches, each a tensor."""

    def __iter__(self):
        return (torch.tensor(batch) for batch in reversed(list(super().__iter__())))


class OfTuples(BatchSampler):
    def __iter__(self):
        return (tuple(batch) for batch in super().__iter__())


def collate_with(scale):
    """A closure, which cannot be pickled."""
    return lambda rows: (scale * torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))


def seed_worker(worker):
    torch.manual_seed(worker)


LOADERS = {
    "subclass with its own __init__": lambda data: Flavoured(data, flavour="x"),
    "subclass that draws ahead": lambda data: Ahead(data, 16, shuffle=True),
    "batches of tensors": lambda data: DataLoader(data, batch_sampler=OfTensors(RandomSampler(data), 16, False)),
    "batches of tuples": lambda data: DataLoader(data, batch_sampler=OfTuples(RandomSampler(data), 16, False)),
    "pinned memory": lambda data: DataLoader(data, 16, shuffle=True, pin_memory=True),
    "generator": lambda data: DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(4)),
    "closure": lambda data: DataLoader(data, 16, shuffle=True, collate_fn=collate_with(1.0)),
    "list of indices": lambda data: DataLoader(data, 16, sampler=list(range(N - 1, -1, -1))),
    "all that workers take": lambda data: DataLoader(
        data,
        16,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=3,
        multiprocessing_context="fork",
        worker_init_fn=seed_worker,
        timeout=30,
        in_order=False,
        collate_fn=collate_with(1.0),
    ),
    "combined loader of one": lambda data: CombinedLoader(DataLoader(data, 16, shuffle=True), "min_size"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_as_they_are_made(name):
    data = Blobs()
    loader = LOADERS[name](data)
    partition, _, finetune = trio(AT, recipe="auto")
    record = IndexRecorder(data)
    fit(Toy(), loader, [partition, finetune, record])
    clean = partition.partition.clean_indices().tolist()
    right = set((~data.wrong).nonzero().flatten().tolist())
    assert set(clean) <= right
    assert len(right) - len(clean) <= 1  # a precision of .85 is asked for
    for epoch in range(4):
        assert sorted(record.by_epoch[epoch]) == (list(range(N)) if epoch < AT else clean)


def several(data):
    return {"noisy": DataLoader(data, 16), "other": DataLoader(data, 16)}


class Stored:
    """A wrapper that is no DataLoader."""

    def __init__(self, data):
        self.loader = DataLoader(data, 16)

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)


class Episodes(BatchSampler):
    """Few-shot tasks, without end."""

    def __iter__(self):
        return itertools.repeat(list(range(16)))


class WrongLength(BatchSampler):
    """Says what it had in the beginning."""

    def __init__(self, sampler):
        super().__init__(sampler, 16, False)
        self.number = super().__len__()

    def __iter__(self):
        return super().__iter__()

    def __len__(self):
        return self.number


class NoLength:
    batch_size, drop_last = 16, False

    def __init__(self, data):
        self.sampler = RandomSampler(data)

    def __iter__(self):
        return iter(BatchSampler(self.sampler, 16, False))


class OfPairs(BatchSampler):
    """An index and a resolution."""

    def __iter__(self):
        return ([(index, 32) for index in batch] for batch in super().__iter__())


class OfResolutions(Blobs):
    def __getitem__(self, index):
        return super().__getitem__(index[0] if isinstance(index, tuple) else index)


class Curriculum(RandomSampler):
    def __iter__(self):
        return iter(range(16))


REFUSED = {
    "several": (several, "got dict; give the loader with the noisy data alone, and draw from the others in"),
    "a list": (lambda data: list(several(data).values()), "got list; give the loader with the noisy data alone, and"),
    "combined": (lambda data: CombinedLoader(several(data), "max_size_cycle"), "got dict; give the loader with the"),
    "no DataLoader": (Stored, "got Stored; give the loader with the noisy data alone, not wrapped"),
    "two batches in one": (lambda data: Pairwise(data, 16), "but Pairwise has its own __iter__"),
    "one iterator for ever": (lambda data: OneForEver(data, 16), "but OneForEver has its own __iter__"),
    "not from its batch sampler": (lambda data: Elsewhere(data, 16), "but Elsewhere has its own __iter__"),
    "no batches": (lambda data: DataLoader(data, None), "has batch_size=None; set a batch_size"),
    "batches without end": (
        lambda data: DataLoader(data, batch_sampler=Episodes(RandomSampler(data), 16, False)),
        "Episodes makes 17 batches of 17 samples and has length 2",
    ),
    "stale length": (
        lambda data: DataLoader(data, batch_sampler=WrongLength(RandomSampler(data))),
        "WrongLength makes 2 batches of 17 samples and has length 13",
    ),
    "no length": (
        lambda data: DataLoader(data, batch_sampler=NoLength(data)),
        "to have a length, .batch_size and .drop_last, as torch's BatchSampler has, but NoLength has not",
    ),
    "pairs": (
        lambda data: DataLoader(OfResolutions(), batch_sampler=OfPairs(RandomSampler(data), 16, False)),
        "but OfPairs fails when that is replaced",
    ),
    "fixed batches": (
        lambda data: DataLoader(data, batch_sampler=[[0, 1], [2, 3]]),
        "draws with list without",
    ),
    "sampler of one's own": (
        lambda data: DataLoader(data, 16, sampler=Curriculum(data)),
        "draws with Curriculum",
    ),
}


@pytest.mark.parametrize("given", ["loader", "datamodule"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_narrowed_is_refused_before_the_first_step(name, given):
    make, message = REFUSED[name]
    data = Blobs()

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return make(data)

    module = Toy()
    with pytest.raises(TypeError if name != "no batches" else ValueError, match=message):
        fit(module, make(data) if given == "loader" else Data(), trio(AT))
    assert module.steps == 0


class Halts(Exception):
    pass


class Stops(Toy):
    def training_step(self, batch):
        if self.current_epoch == AT + 1:
            raise Halts
        return super().training_step(batch)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_users_sampler_draws_from_the_clean_ones_as_it_did_from_all(name):
    data = Blobs()
    loader = loader_of(name, data)
    before, sampler, number = dict(vars(loader)), loader.batch_sampler.sampler, len(loader.batch_sampler.sampler)
    partition, _, finetune = trio(AT)
    record, module = IndexRecorder(data), Toy()
    fit(module, loader, [partition, finetune, record])
    assert finetune.is_active
    clean = set(partition.partition.clean_indices().tolist())
    assert clean < set(range(N))
    for epoch in (AT, AT + 1):
        assert record.by_epoch[epoch] == expected(loader, partition.partition, epoch)
        assert set(record.by_epoch[epoch]) <= clean
    assert record.by_epoch[AT] != record.by_epoch[AT + 1]
    # About as many fewer as are not clean; and what the weights hold back is held back still.
    assert 0.6 * number < len(record.by_epoch[AT]) < 0.95 * number
    # The partition is of all samples, of those too that were never drawn, and as good as with any loader.
    assert len(partition.partition) == N
    assert auroc(1 - partition.partition.clean_probability, data.wrong) > 0.95
    assert vars(loader) == before
    assert loader.batch_sampler.sampler is sampler


def test_evidence_is_read_from_a_loader_that_repeats_samples_and_leaves_others_out():
    data = Blobs()
    partition = trio(AT)[0]
    record = IndexRecorder(data)
    fit(Toy(), loader_of("weights of zero", data), [partition, record], max_epochs=AT + 1)
    drawn = [index for epoch in range(AT) for index in record.by_epoch[epoch]]
    assert min(drawn) == N // 3
    assert len(set(record.by_epoch[0])) < len(record.by_epoch[0])
    assert partition.collector.reader.reason == ""
    assert partition.collector.epochs_seen == [1, 2]


def test_the_users_sampler_is_back_after_an_exception():
    loader = loader_of("weighted", Blobs())
    before, sampler = dict(vars(loader)), loader.sampler
    finetune = trio(AT)[2]
    with pytest.raises(Halts):
        fit(Stops(), loader, [trio(AT)[0], finetune])
    assert finetune.is_active
    assert vars(loader) == before
    assert loader.batch_sampler.sampler is sampler


def test_weights_are_multiplied_by_the_probability_of_being_clean():
    data = Blobs()
    loader = loader_of("weighted by class", data)
    partition, _, finetune = trio(AT, finetune={"on_noisy": "reweight"})
    record = IndexRecorder(data)
    fit(Toy(), loader, [partition, finetune, record])
    draw = finetune.training_subset
    share = torch.zeros(N, dtype=torch.float64)
    share[draw.index] = draw.probability.double()
    weight = loader.sampler.weights
    assert len(record.by_epoch[AT]) == round(160 * ((weight * share).sum() / weight.sum()).item())
    scheme = scheme_of(loader.sampler).restricted_to(draw.index, draw.probability)
    torch.testing.assert_close(scheme.weight, (weight * share)[draw.index])
    sampler = CleanSubsetSampler(scheme, num_replicas=1, rank=0, seed=0)
    sampler.set_epoch(AT)
    assert record.by_epoch[AT] == list(sampler)


def test_what_a_weighted_sampler_draws_is_relabeled():
    data = Blobs()
    partition, _, finetune = trio(AT, finetune={"on_noisy": "relabel"})
    seen = {}

    class Sees(IndexRecorder):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.current_epoch >= AT:
                indices = self.by_epoch[trainer.current_epoch][-len(batch[1]) :]
                seen.update(zip(indices, batch[1].tolist(), strict=True))

    fit(Toy(), loader_of("weights of zero", data), [partition, finetune, Sees(data)])
    new = finetune.training_subset.new_label
    assert len(seen) > 50
    assert all(label == (new[index] if new[index] >= 0 else data.y[index]) for index, label in seen.items())
    changed = [index for index in seen if new[index] >= 0]
    assert len(changed) > 5
    assert all(seen[index] == data.clean[index] for index in changed)


def test_new_weights_of_a_later_epoch_are_followed():
    """As deferred re-weighting does, with a loader that is made anew in every epoch."""
    data = Blobs()
    made = []

    class Deferred(Toy):
        def train_dataloader(self):
            weight = torch.ones(N)
            if self.current_epoch >= AT:
                weight[100 - 10 * self.current_epoch :] = 0
            made.append(DataLoader(data, batch_size=16, sampler=WeightedRandomSampler(weight, N)))
            return made[-1]

    partition, _, finetune = trio(AT)
    record, module = IndexRecorder(data), Deferred()
    fit(module, None, [partition, finetune, record], reload_dataloaders_every_n_epochs=1)
    assert len(made) == 4
    for epoch in (AT, AT + 1):
        assert record.by_epoch[epoch] == expected(made[epoch], partition.partition, epoch)
        assert max(record.by_epoch[epoch]) < 100 - 10 * epoch


def test_a_resumed_fit_draws_with_the_weights_too(tmp_path):
    def run(ckpt_path=None, **kwargs):
        data = Blobs()
        record, callbacks = IndexRecorder(data), trio(AT)
        trainer = fit(
            Toy(), loader_of("weighted", data), [*callbacks, record], ckpt_path=ckpt_path, max_epochs=4, **kwargs
        )
        return trainer, record.by_epoch

    trainer, whole = run()
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert "weight" not in str(state["callbacks"]["CleanSubsetFinetuneCallback"]["training_subset"].keys())

    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == AT:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    data = Blobs()
    fit(Toy(), loader_of("weighted", data), [*trio(AT), Saves()], max_epochs=4)
    _, resumed = run(tmp_path / "middle.ckpt")
    assert resumed == {AT + 1: whole[AT + 1]}


def test_where_no_weight_is_left_training_goes_on_with_all_and_says_so():
    data = Blobs()
    weight = data.wrong.float()
    loader = DataLoader(data, batch_size=16, sampler=WeightedRandomSampler(weight, 64))
    record = IndexRecorder(data)
    partition = partition_callback(
        at_epoch=1, recipe=lambda evidence: (~data.wrong[evidence.index]).float(), min_class_fraction=0
    )
    with pytest.warns(UserWarning, match="do not fill one batch on each rank .drop_last, limit_train_batches, weights"):
        fit(Toy(), loader, [partition, CleanSubsetFinetuneCallback(), record], max_epochs=2)
    assert len(record.by_epoch[1]) == 64


def test_what_a_distributed_sampler_of_the_user_says_holds_for_the_subset():
    """It may split the data over other parts than the ranks, as where several ranks share a model."""
    data, partition, _, finetune = Blobs(), *trio(AT)
    sampler = DistributedSampler(data, num_replicas=4, rank=2, seed=11, drop_last=True)
    record = IndexRecorder(data)
    fit(Toy(), DataLoader(data, 16, sampler=sampler), [partition, finetune, record])
    clean = partition.partition.clean_indices()
    assert len(clean) % 4
    again = DistributedSampler(clean, num_replicas=4, rank=2, seed=11, drop_last=True)
    for epoch in (AT, AT + 1):
        again.set_epoch(epoch)
        drawn = [clean[position].item() for position in again]
        # A batch of one is left out for the sake of batch norm.
        assert record.by_epoch[epoch] == drawn[: len(drawn) - (len(drawn) % 16 == 1)]
    assert finetune.provenance_entry(partition.partition)["seed"] == 11


# torchdata's loader, whose iterator has another layout and can be resumed within an epoch.


def stateful(data, **kwargs):
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return module.StatefulDataLoader(data, 16, shuffle=True, **kwargs)


def stateful_over_torchs_batch_sampler(data):
    module = pytest.importorskip("torchdata.stateful_dataloader")
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(1))
    return module.StatefulDataLoader(data, batch_sampler=BatchSampler(sampler, 16, False))


STATEFUL = {
    "shuffled": stateful,
    "persistent workers": lambda data: stateful(data, num_workers=2, persistent_workers=True),
    "torch's batch sampler": stateful_over_torchs_batch_sampler,
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_stateful_loader_is_read_narrowed_relabeled_and_resumed_within_an_epoch(name, tmp_path):
    data = Blobs()

    def run(ckpt_path=None, callbacks=()):
        module, ours = Noting(data), trio(AT, finetune={"on_noisy": "relabel"})
        fit(module, STATEFUL[name](data), [*ours, *callbacks], ckpt_path=ckpt_path, enable_checkpointing=True)
        return module, ours

    kept = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=8)
    _, (partition, _, finetune) = run(callbacks=[kept])
    assert partition.collector.reader.reason == ""
    assert partition.collector.epochs_seen == [1, 2]
    assert finetune.is_active
    for step in (8, 32, 40):
        resumed, (partition, _, finetune) = run(tmp_path / f"step={step}.ckpt")
        assert partition.collector.epochs_seen == [1, 2]
        assert_same_labels_as_drawn(resumed, finetune, data)
        assert len(resumed.trained[step // 13]) == 203 - 16 * (step % 13)


def assert_same_labels_as_drawn(module, finetune, data):
    new = finetune.training_subset.new_label
    for epoch, notes in module.trained.items():
        for index, labels in notes.items():
            relabeled = epoch >= AT and new[index] >= 0
            assert labels == [(new if relabeled else data.y)[index].item()]
