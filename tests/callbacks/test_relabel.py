"""Which labels training sees once suspects are re-labeled, and that nobody else sees them."""

import copy
import gc
import io
import time
from collections import namedtuple
from dataclasses import dataclass

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, default_collate

from lightning_unlearn import CleanSubsetFinetuneCallback, DataFormat
from lightning_unlearn.data.loaders import iterate_indices
from lightning_unlearn.data.task_format import TaskFormat, split_batch
from lightning_unlearn.finetuning.relabeled_batch import with_labels
from lightning_unlearn.results.labels import REASONS
from tests.callbacks.published import Published, make_partition
from tests.toys import CLASSES, Blobs, Toy, assert_same_weights, fit, mlp, weights
from tests.toys import QuickData as BlobsData
from tests.toys import quick_trio as trio

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{line}:UserWarning")
    for line in (
        "You defined a `validation_step`",
        "Be aware that when using `ckpt_path`",
        ".*dataloader_iter",
        "You.re resuming",
    )
]
SIZE, AT, EPOCHS = 101, 1, 3
LABEL, INPUT = REASONS.index("label"), REASONS.index("input")


def known(data, split=split_batch):
    """Publishes who is wrong and what would be right: a fifth of them unsurely, another fifth for their input."""
    partition = make_partition(torch.where(data.wrong, 0.1, 0.9), data.y, epoch=AT)
    kind = torch.where(data.wrong, data.wrong.cumsum(0) % 5, 9)
    object.__setattr__(partition, "suggested_label", data.clean)
    object.__setattr__(partition, "suggested_probability", torch.where(kind == 1, 0.5, 0.9))
    partition.reason[kind == 2] = INPUT
    source = Published(partition)
    source.task_format = TaskFormat(DataFormat(batch_to_xy=split))
    return source


def to_be_seen(data, partition):
    """The label that training is to see, by dataset index."""
    labels = {}
    for i in range(len(data)):
        if partition.is_clean[i]:
            labels[i] = data.y[i].item()
        elif partition.reason[i] == LABEL and partition.suggested_probability[i] >= 0.7:
            labels[i] = partition.suggested_label[i].item()
    return labels


def given(data):
    return dict(enumerate(data.y.tolist()))


class Noting(Toy):
    """Notes the label of every sample that a step gets, by the sample's content.

    Args:
        data: whose samples are recognized.
        split: from a batch to (x, y).
    """

    def __init__(self, data, split=split_batch, **kwargs):
        super().__init__(**kwargs)
        self.known = {row.numpy().tobytes(): index for index, row in enumerate(data.x)}
        self.split = split
        self.trained, self.validated, self.sanity = {}, {}, {}

    def note(self, notes, batch):
        x, y = self.split(batch)
        for row, label in zip(x.float().cpu(), y.tolist(), strict=True):
            notes.setdefault(self.current_epoch, {}).setdefault(self.known[row.numpy().tobytes()], []).append(label)
        return x, y

    def training_step(self, batch):
        return super().training_step(self.note(self.trained, batch))

    def validation_step(self, batch):
        self.note(self.sanity if self.trainer.sanity_checking else self.validated, batch)


class Same(BlobsData):
    """Validates on the very samples that it trains on."""

    def val_dataloader(self):
        return DataLoader(self.train, batch_size=64)


def once(notes):
    """The one label that each sample had in an epoch."""
    assert all(len(labels) == 1 for labels in notes.values())
    return {index: labels[0] for index, labels in notes.items()}


def assert_relabeled(data, loader, *, split=split_batch, module=None, partly=False, callbacks=(), **trainer):
    """Fits, and looks at every label that a training step was given."""
    source, finetune = known(data, split), CleanSubsetFinetuneCallback(on_noisy="relabel")
    module = module or Noting(data, split)
    before = data.x.clone(), data.y.clone()
    made = fit(module, loader, [source, finetune, *callbacks], max_epochs=EPOCHS, **trainer)
    expected = to_be_seen(data, source.partitions[0])
    assert 0 < len(finetune.training_subset.relabeled) < data.wrong.sum()
    assert set(module.trained) == set(range(EPOCHS))
    for epoch in range(EPOCHS):
        seen, wanted = once(module.trained[epoch]), given(data) if epoch < AT else expected
        assert seen == ({index: wanted[index] for index in seen} if partly else wanted), epoch
        assert len(seen) > 30
    assert data.x.equal(before[0])
    assert data.y.equal(before[1])
    assert "_on_before_batch_transfer" not in module.__dict__
    return made, module, finetune


class Halves(BatchSampler):
    """Yields what its sampler gives, each batch from both ends."""

    def __iter__(self):
        drawn = list(self.sampler)
        while drawn:
            yield [drawn.pop(0 if len(drawn) % 2 else -1) for _ in range(min(self.batch_size, len(drawn)))]


def halves(data):
    return DataLoader(data, batch_sampler=Halves(RandomSampler(data), 16, False))


LOADERS = {
    "shuffled": {},
    "in order": {"shuffle": False},
    "workers that fetch ahead": {"num_workers": 2, "prefetch_factor": 3},
    "persistent workers": {"num_workers": 2, "persistent_workers": True},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_training_sees_the_new_labels_and_the_loader_stays_the_users(kind):
    data = Blobs(SIZE)
    loader = DataLoader(data, batch_size=16, **{"shuffle": True, **LOADERS[kind]})
    before, sampler, batches = dict(vars(loader)), loader.sampler, loader.batch_sampler
    assert_relabeled(data, loader)
    assert loader.sampler is sampler
    assert loader.batch_sampler is batches
    assert type(batches) is BatchSampler
    assert batches.sampler is sampler
    assert {k: v for k, v in vars(loader).items() if k != "_iterator"} == {
        k: v for k, v in before.items() if k != "_iterator"
    }
    assert loader.dataset is data


@pytest.mark.parametrize(
    ("loader", "trainer"),
    [
        ({}, {"accumulate_grad_batches": 3}),
        ({}, {"precision": "bf16-mixed"}),
        ({}, {"precision": "64-true"}),
        ({}, {"reload_dataloaders_every_n_epochs": 1}),
        ({"drop_last": True}, {"limit_train_batches": 4}),
        ({}, {"val_check_interval": 2, "num_sanity_val_steps": 2}),
    ],
    ids=str,
)
def test_whatever_the_trainer_does_beside(loader, trainer):
    data = Blobs(SIZE)
    _, module, _ = assert_relabeled(data, Same(data, **loader), partly="limit_train_batches" in trainer, **trainer)
    # Validation, on the very samples, sees the labels as they are given.
    assert all(set(labels) == {given(data)[i]} for notes in module.validated.values() for i, labels in notes.items())
    assert set(module.validated) == set(range(EPOCHS))
    assert set(module.sanity[0]) == set(range(SIZE))


def test_manual_optimization():
    data = Blobs(SIZE)
    assert_relabeled(data, Same(data), module=Noting(data, manual=True))


class Prepares(L.Callback):
    """Prepares inputs of its own with Lightning's private hook in the middle of the fit."""

    def __init__(self, data):
        self.batch, self.done, self.traced = (data.x[:4], data.y[:4]), 0, 0

    def prepare(self, trainer, pl_module, *_):
        # Where batches are fetched and where they are not, but not at every one of them, as these take long.
        if not trainer.fit_loop.epoch_loop.batch_idx % 5:
            pl_module.example_input_array = self.batch[0]
            ModelSummary(pl_module, max_depth=-1)
            pl_module.to_torchscript(method="trace", example_inputs=self.batch[0])
            self.traced += 1
        moved = pl_module._on_before_batch_transfer(self.batch)
        assert moved[1].equal(self.batch[1])
        assert trainer.strategy.batch_to_device(self.batch)[1].equal(self.batch[1])
        self.done += 1

    on_train_start = on_train_epoch_start = on_train_epoch_end = on_train_end = prepare
    on_train_batch_start = on_train_batch_end = on_before_zero_grad = on_validation_epoch_start = prepare


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_whoever_else_uses_the_transfer_hook_gets_what_is_his(workers):
    data = Blobs(SIZE)
    loader, prepares = DataLoader(data, batch_size=16, shuffle=True, num_workers=workers), Prepares(data)
    assert_relabeled(data, loader, callbacks=[prepares])
    assert prepares.done > 30
    assert prepares.traced > 20


def test_a_batch_sampler_of_ones_own():
    data = Blobs(SIZE)
    loader = halves(data)
    batches = loader.batch_sampler
    assert_relabeled(data, loader)
    assert loader.batch_sampler is batches
    assert isinstance(batches.sampler, RandomSampler)


Pair = namedtuple("Pair", ["target", "image"])


@dataclass
class Record:
    image: Tensor
    target: Tensor


def as_record(samples):
    return Record(*default_collate(samples))


FORMS = {
    "dict": (lambda s: dict(zip(("x", "y"), default_collate(s), strict=True)), lambda b: (b["x"], b["y"])),
    "named tuple": (lambda s: Pair(*reversed(default_collate(s))), lambda b: (b.image, b.target)),
    "dataclass": (as_record, lambda b: (b.image, b.target)),
    "nested": (lambda s: {"in": (0, default_collate(s))}, lambda b: tuple(b["in"][1])),
    "int32": (lambda s: [default_collate(s)[0], default_collate(s)[1].int()], lambda b: (b[0], b[1])),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_any_form(form):
    collate, split = FORMS[form]
    data = Blobs(SIZE)

    class Form(Noting):
        def training_step(self, batch):
            assert type(batch) is type(collate([data[0]]))
            if form == "int32":
                assert batch[1].dtype == torch.int32
                batch = [batch[0], batch[1].long()]
            return super().training_step(batch)

    loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=collate)
    assert_relabeled(data, loader, split=split, module=Form(data, split))


class Views(Dataset):
    """Hands out slices of its own storage, which whoever writes to them would change."""

    def __init__(self, blobs):
        self.x, self.y = blobs.x, blobs.y
        self.wrong = torch.arange(len(blobs)) % 3 == 0
        self.clean = torch.where(self.wrong, (self.y + 1) % CLASSES, self.y)

    def __len__(self):
        return len(self.x)

    def __getitems__(self, indices):
        assert indices == list(range(indices[0], indices[-1] + 1))
        rows = slice(indices[0], indices[-1] + 1)
        return self.x[rows], self.y[rows]

    def __getitem__(self, index):
        raise NotImplementedError


def test_labels_are_not_overwritten_where_a_batch_is_a_view_of_the_data():
    blobs = Blobs(96)
    data = Views(blobs)
    source = known(data)
    (partition,) = source.partitions
    partition.reason[~partition.is_clean] = LABEL
    partition.suggested_probability[:] = 0.9  # so that all are trained on, in order
    loader = DataLoader(data, batch_size=16, collate_fn=lambda batch: batch)
    assert next(iter(loader))[1].data_ptr() == data.y.data_ptr()
    module, before = Noting(data), data.y.clone()
    fit(module, loader, [source, CleanSubsetFinetuneCallback(on_noisy="relabel")], max_epochs=EPOCHS)
    wanted = torch.where(data.wrong, data.clean, data.y)
    assert [once(module.trained[epoch]) for epoch in (0, 1, 2)] == [
        dict(enumerate(labels.tolist())) for labels in (before, wanted, wanted)
    ]
    assert (wanted != before).any()
    assert data.y.equal(before)


class Hooked(Same):
    """Its transfer hooks shift the input, one on either side of the transfer, and note the labels they see."""

    def __init__(self, data):
        super().__init__(data)
        self.before, self.after, self.passes = [], [], []

    def on_before_batch_transfer(self, batch, dataloader_idx):
        (self.before if self.trainer.training else self.passes).append(batch[1].clone())
        return batch[0] + 1, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.after.append(batch[1].clone())
        return batch[0] * 2, batch[1]


class ModuleHooked(Noting):
    """Has the hooks of :class:`Hooked`."""

    on_before_batch_transfer, on_after_batch_transfer = Hooked.on_before_batch_transfer, Hooked.on_after_batch_transfer
    before, after, passes = [], [], []


@pytest.mark.parametrize("whose", ["datamodule", "module"])
@pytest.mark.filterwarnings("ignore:You have overridden `on_:UserWarning")
def test_transfer_hooks_are_called_and_see_the_new_labels(whose):
    data = Blobs(SIZE)
    module, loader = (Noting(data), Hooked(data)) if whose == "datamodule" else (ModuleHooked(data), Same(data))
    hooks = loader if whose == "datamodule" else module
    # What arrives is 2 (x + 1).
    module.known = {((row + 1) * 2).numpy().tobytes(): index for index, row in enumerate(data.x)}
    assert_relabeled(data, loader, module=module)
    seen = [torch.cat(hook) for hook in (hooks.before, hooks.after)]
    assert seen[0].equal(seen[1])
    assert seen[0].tolist() == [label for e in range(EPOCHS) for label in once(module.trained[e]).values()]
    assert hooks.passes


class ChangesLabels(BlobsData):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0], (batch[1] + 1) % CLASSES


class DrawsItself(Toy):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch)


def hot(samples):
    x, y = default_collate(samples)
    return x, one_hot(y, CLASSES)


ADVICE = "; use on_noisy='drop' or 'reweight', which do not replace labels"
REFUSED = {
    "labels that are made": (lambda data: DataLoader(data, 16, collate_fn=hot), "computes them from something else"),
    "hooks that change labels": (ChangesLabels, "the transfer hooks change them"),
    "workers out of order": (lambda data: DataLoader(data, 16, num_workers=1, in_order=False), "in_order=False"),
    "a step that draws batches": (BlobsData, "training_step draws batches itself"),
    "a loader of ones own": (lambda data: Own(data, 16), "but Own does not"),
}


class Own(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_relabeled_is_refused_before_the_first_step(case):
    make, message = REFUSED[case]
    data = Blobs(SIZE)
    split = (
        (lambda batch: (batch[0], batch[1].argmax(1))) if make is REFUSED["labels that are made"][0] else split_batch
    )
    module = DrawsItself() if case == "a step that draws batches" else Toy()
    callbacks = [known(data, split), CleanSubsetFinetuneCallback(on_noisy="relabel")]
    with pytest.raises(TypeError) as error:
        fit(module, make(data), callbacks)
    assert message in str(error.value)
    assert ADVICE in str(error.value)
    assert module.steps == 0
    assert "_on_before_batch_transfer" not in module.__dict__
    # The error holds a worker, which is better let go alone than with other garbage, where it takes seconds.
    del error
    gc.collect()


@pytest.mark.parametrize("case", ["hooks that change labels", "workers out of order", "a step that draws batches"])
@pytest.mark.parametrize("on_noisy", ["drop", "reweight"])
def test_the_way_out_that_the_message_names_is_one(case, on_noisy):
    data = Blobs(SIZE)
    module = DrawsItself() if case == "a step that draws batches" else Toy()
    finetune = CleanSubsetFinetuneCallback(on_noisy=on_noisy)
    fit(module, REFUSED[case][0](data), [known(data), finetune], max_epochs=2)
    assert finetune.is_active


class Slow(Dataset):
    """Whose first batch is ready last."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        time.sleep(0.3 * (index == 0))
        return torch.tensor(index), torch.tensor(index)


def test_our_own_passes_know_their_samples_where_the_loader_delivers_out_of_order():
    loader = DataLoader(Slow(), batch_size=2, num_workers=2, in_order=False)
    assert next(iter(loader))[0].tolist() != [0, 1]
    for index, (x, _) in iterate_indices(loader, torch.arange(12)):
        assert index.equal(x)
    assert loader.in_order is False


class Halts(Exception):
    """As a full disk would."""


def test_after_an_exception_nothing_is_left():
    data = Blobs(SIZE)

    class Halting(Noting):
        def training_step(self, batch):
            if self.current_epoch == 2:
                assert "_on_before_batch_transfer" in self.__dict__
                raise Halts
            return super().training_step(batch)

    loader = DataLoader(data, batch_size=16, shuffle=True)
    sampler, batches, module = loader.sampler, loader.batch_sampler, Halting(data)
    with pytest.raises(Halts):
        fit(module, loader, [known(data), CleanSubsetFinetuneCallback(on_noisy="relabel")])
    assert "_on_before_batch_transfer" not in module.__dict__
    assert loader.sampler is sampler
    assert loader.batch_sampler is batches
    assert batches.sampler is sampler
    again = Noting(data)
    fit(again, loader, max_epochs=1)
    assert once(again.trained[0]) == given(data)


class ShiftsInput(Toy):
    """At the level of the module, so that it can be pickled."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]


class Copies(L.Callback):
    """Copies the module in the middle of fine-tuning, in every way."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            assert "_on_before_batch_transfer" in pl_module.__dict__
            buffer = io.BytesIO()
            torch.save(pl_module, buffer)
            buffer.seek(0)
            self.copies = {
                "deep copy": copy.deepcopy(pl_module),
                "pickle": torch.load(buffer, weights_only=False),
                "copy of a copy": copy.deepcopy(copy.deepcopy(pl_module)),
            }
            # While the fit that they were made in goes on.
            x = torch.zeros(3, 16)
            self.got = {
                name: twin._on_before_batch_transfer((x, torch.tensor([0, 1, 2]))) for name, twin in self.copies.items()
            }


def test_copies_made_during_the_fit_leave_batches_alone_and_keep_their_own_hooks():
    data, copies = Blobs(SIZE), Copies()
    finetune = CleanSubsetFinetuneCallback(on_noisy="relabel")
    module = ShiftsInput()
    fit(module, BlobsData(data), [known(data), finetune, copies], max_epochs=EPOCHS)
    assert set(copies.copies) == {"deep copy", "pickle", "copy of a copy"}
    for name, (x, y) in copies.got.items():
        assert (x == 1).all(), name
        assert y.tolist() == [0, 1, 2], name
    for name, twin in copies.copies.items():
        assert twin is not module
        hook = twin.__dict__.get("_on_before_batch_transfer")
        assert hook is None or hook.__self__ is twin, name
        # It can be trained by itself, and with the callbacks.
        twin.steps_by_epoch = {}
        fit(twin, BlobsData(data), max_epochs=1)
        fit(twin, BlobsData(data), [known(data), CleanSubsetFinetuneCallback(on_noisy="relabel")], max_epochs=2)
        assert "_on_before_batch_transfer" not in twin.__dict__, name


@pytest.mark.parametrize("variant", [{}, {"lr": 0.01}, {"on_noisy": "reweight"}], ids=str)
def test_resuming_equals_the_uninterrupted_fit(tmp_path, variant):
    epochs, at = 5, 2
    data = Blobs(SIZE)

    def start(epoch=None, callbacks=()):
        ours, module = trio(at, finetune={"on_noisy": "relabel", "relabel_threshold": 0.4, **variant}), Noting(data)
        loader = Same(data, by_epoch=True)
        ckpt_path = None if epoch is None else tmp_path / f"epoch={epoch}.ckpt"
        fit(
            module,
            loader,
            [*ours, *callbacks],
            ckpt_path=ckpt_path,
            max_epochs=epochs,
            enable_checkpointing=bool(callbacks),
            num_sanity_val_steps=-1,
        )
        return ours, module

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    (partition, _, finetune), whole = start(callbacks=[keep])
    if "on_noisy" not in variant:
        assert len(finetune.training_subset.relabeled) > 5
        assert [once(whole.trained[e]) == to_be_seen_by(data, finetune) for e in range(epochs)] == [
            epoch >= at for epoch in range(epochs)
        ]
    for epoch in range(at - 1, epochs - 1):
        ours, module = start(epoch)
        assert ours[0].partition.is_clean.equal(partition.partition.is_clean)
        assert module.trained == {e: whole.trained[e] for e in range(epoch + 1, epochs)}, epoch
        assert module.sanity
        for notes in (*module.sanity.values(), *module.validated.values()):
            assert all(set(labels) == {given(data)[i]} for i, labels in notes.items())
        assert_same_weights(weights(module), weights(whole), 1e-6)


def to_be_seen_by(data, finetune):
    new = finetune.training_subset.new_label.tolist()
    return {i: new[i] if new[i] >= 0 else data.y[i].item() for i in finetune.training_subset.index.tolist()}


class Workers(Same):
    def train_dataloader(self):
        sampler = DistributedSampler(self.train, num_replicas=1, rank=0, seed=1)
        return DataLoader(self.train, batch_size=16, sampler=sampler, num_workers=1, persistent_workers=True)


def test_resuming_with_workers_sees_the_same_labels(tmp_path):
    data = Blobs(SIZE)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    settings = {"on_noisy": "relabel", "relabel_threshold": 0.4}
    whole, again = Noting(data), Noting(data)
    fit(whole, Workers(data), [*trio(1, finetune=settings), keep], max_epochs=4, enable_checkpointing=True)
    fit(again, Workers(data), trio(1, finetune=settings), max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.trained == {epoch: whole.trained[epoch] for epoch in (2, 3)}


def test_a_fit_that_goes_on_with_the_same_trainer_relabels_on():
    data, callbacks = Blobs(SIZE), trio(2, finetune={"on_noisy": "relabel", "relabel_threshold": 0.4})
    module = Noting(data)
    trainer = fit(module, Same(data), callbacks)
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, datamodule=Same(data))
    assert len(callbacks[2].training_subset.relabeled) > 5
    assert [once(module.trained[e]) for e in (2, 3, 4, 5)] == [to_be_seen_by(data, callbacks[2])] * 4
    assert "_on_before_batch_transfer" not in module.__dict__


@pytest.mark.parametrize("average", ["EMA", "SWA"])
def test_beside_averaged_weights(average):
    if average == "EMA":
        beside = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging").EMAWeightAveraging(decay=0.9)
    else:
        beside = L.pytorch.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=3, annealing_epochs=1)
    data, callbacks = Blobs(SIZE), trio(2, finetune={"on_noisy": "relabel", "relabel_threshold": 0.4})
    module = Noting(data)
    fit(module, Same(data), [beside, *callbacks], max_epochs=5)
    assert len(callbacks[2].training_subset.relabeled) > 5
    for epoch, seen in module.trained.items():
        assert once(seen) == (given(data) if epoch < 2 else to_be_seen_by(data, callbacks[2])), epoch
    pruned = callbacks[1].mask.pruned_indices()
    assert (module.get_submodule(callbacks[1].target_layer()).weight[pruned] == 0).all()
    assert "_on_before_batch_transfer" not in module.__dict__
    assert all(value.isfinite().all() for value in weights(module).values())


def test_beside_accumulation_clipping_and_a_dropout():
    data = Blobs(SIZE)
    module = Noting(data, net=lambda: mlp(0.3))
    made, _, _ = assert_relabeled(data, Same(data), module=module, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert made.global_step == 2 + 2 * -(-module.steps_by_epoch[1] // 2)


NEW = torch.tensor([-1, 3, 0])


def settled(split=None, task="multiclass", outputs=4):
    task_format = TaskFormat(DataFormat(task=task, batch_to_xy=split))
    task_format.infer_task(torch.zeros(2, outputs), torch.zeros(2, dtype=torch.int64))
    return task_format


def test_only_the_labels_of_a_batch_are_replaced_and_in_a_copy():
    x, y, other = torch.zeros(3, 2), torch.tensor([1, 1, 1]), torch.tensor([1, 1, 1])
    batch = {"x": x, "pair": [y, other], "same": y, "word": "a"}
    changed = with_labels(batch, settled(lambda b: (b["x"], b["pair"][0])), NEW)
    assert changed["pair"][0].tolist() == changed["same"].tolist() == [1, 3, 0]
    assert changed["x"] is x
    assert changed["pair"][1] is other
    assert changed["word"] == "a"
    assert batch["pair"][0] is y
    assert y.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(3), r"cannot be replaced; .*integer labels of shape \(3,\),.* but got torch.float32 of"),
        (torch.ones(2, dtype=torch.int64), r"labels of 3 rows .*, but got 2; "),
        (torch.ones(3, 5, dtype=torch.int64), r"cannot be replaced; .* but got torch.int64 of shape \(3, 5\)"),
    ],
    ids=["floats", "too few", "columns"],
)
def test_labels_that_are_not_one_integer_per_row_are_not_replaced(labels, message):
    with pytest.raises(TypeError, match=message) as error:
        with_labels((torch.zeros(3, 2), labels), settled(), NEW)
    assert "use on_noisy='drop' or 'reweight'" in str(error.value)


def test_weighing_draws_as_many_in_every_epoch_and_each_as_often_as_it_is_likely_clean():
    data, epochs = Blobs(SIZE), 41
    source = known(data)
    (partition,) = source.partitions
    partition.clean_probability[:] = torch.arange(SIZE).float() / (SIZE - 1)
    object.__setattr__(partition, "is_clean", partition.clean_probability >= 0.5)
    finetune, module, batches = CleanSubsetFinetuneCallback(on_noisy="reweight"), Noting(data), []

    class Counts(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            batches.append(trainer.num_training_batches)

    fit(module, DataLoader(data, 16, shuffle=True), [source, finetune, Counts()], max_epochs=epochs)
    number = int(partition.clean_probability.double().sum() + 1e-6)
    assert number == 50
    assert batches == [7] + [4] * (epochs - 1)
    assert [len(once(module.trained[e])) for e in range(epochs)] == [SIZE] + [number] * (epochs - 1)
    assert all(once(notes).items() <= given(data).items() for notes in module.trained.values())
    counts = torch.zeros(SIZE)
    for epoch in range(1, epochs):
        counts[list(module.trained[epoch])] += 1
    off = counts / (epochs - 1) - partition.clean_probability * number / partition.clean_probability.sum()
    # Five standard deviations of the mean of 40 draws at most.
    assert off.abs().max() < 5 * 0.5 / 40**0.5
    assert (off**2).mean().sqrt() < 0.1
    assert counts[0] == 0
    assert counts[-1] == epochs - 1


@pytest.mark.parametrize("step", [9, 10])
def test_resuming_in_the_middle_of_an_epoch_relabels_the_batches_that_come(tmp_path, step):
    """Four steps an epoch on all the data, then fewer."""
    data, settings = Blobs(SIZE), {"on_noisy": "relabel", "relabel_threshold": 0.4}
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    fit(Noting(data), Same(data), [*trio(2, finetune=settings), keep], max_epochs=3, enable_checkpointing=True)
    module, callbacks = Noting(data), trio(2, finetune=settings)
    fit(module, Same(data), callbacks, max_epochs=4, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert set(module.trained) == {2, 3}
    wanted = to_be_seen_by(data, callbacks[2])
    assert len(callbacks[2].training_subset.relabeled) > 5
    for epoch in (2, 3):
        assert all(wanted[index] == label for index, label in once(module.trained[epoch]).items())
    assert once(module.trained[3]) == wanted
