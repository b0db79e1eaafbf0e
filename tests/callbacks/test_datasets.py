"""Map-style data sets of all kinds: an index is a position in the train loader's data set. Streams are refused."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    random_split,
)

from lightning_unlearn import AttributionPartitionCallback
from tests.toys import Blobs, Toy, auroc, fit
from tests.toys import quick_trio as trio

AT = 2
SOME = torch.randperm(203, generator=torch.Generator().manual_seed(1))[:150].tolist()


class Together(Dataset):
    """Is asked for whole batches."""

    def __init__(self, blobs):
        self.blobs, self.asked = blobs, 0

    def __len__(self):
        return len(self.blobs)

    def __getitem__(self, index):
        return self.blobs[index]

    def __getitems__(self, indices):
        self.asked += 1
        return [self.blobs[index] for index in indices]


def hugging_face(blobs):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"x": blobs.x.tolist(), "y": blobs.y.tolist()}).with_format("torch")


# name -> (the data set, from the blobs; which sample of the blobs is at each position, all in order by default).
KINDS = {
    "concatenated": (lambda blobs: ConcatDataset([Subset(blobs, range(90)), Subset(blobs, range(90, 203))]), None),
    "subset": (lambda blobs: Subset(blobs, SOME), SOME),
    "random split": (lambda blobs: random_split(blobs, [150, 53], torch.Generator().manual_seed(3))[0], "indices"),
    "subset of a subset": (lambda blobs: Subset(Subset(blobs, SOME), range(149, -1, -1)), SOME[::-1]),
    "tensors": (lambda blobs: TensorDataset(blobs.x, blobs.y), None),
    "stacked": (lambda blobs: StackDataset(blobs.x, blobs.y), None),
    "list of tuples": (lambda blobs: [(x, int(y)) for x, y in blobs], None),
    "whole batches": (Together, None),
    "Hugging Face": (hugging_face, None),
}


def as_pair(batch):
    return (batch["x"], batch["y"]) if isinstance(batch, dict) else batch


class Pairs(Toy):
    """Takes batches of either form."""

    def training_step(self, batch):
        return super().training_step(as_pair(batch))


class Drawn(L.Callback):
    """The samples of the blobs that every batch holds, by epoch."""

    def __init__(self, blobs):
        self.known = {row.numpy().tobytes(): index for index, row in enumerate(blobs.x)}
        self.by_epoch = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows = as_pair(batch)[0].float()
        self.by_epoch.setdefault(trainer.current_epoch, []).extend(self.known[row.numpy().tobytes()] for row in rows)


@pytest.mark.parametrize("name", KINDS)
def test_an_index_is_a_position_in_the_data_set_of_the_loader(name):
    make, where = KINDS[name]
    blobs = Blobs()
    data = make(blobs)
    where = list(range(203)) if where is None else data.indices if where == "indices" else where
    # Without it, a batch of Hugging Face is not a pair.
    partition, _, finetune = trio(AT)
    drawn = Drawn(blobs)
    fit(Pairs(), DataLoader(data, 16, shuffle=True), [partition, finetune, drawn])
    found = partition.partition
    assert len(found) == len(data)
    assert found.label.equal(blobs.y[where])
    assert auroc(1 - found.clean_probability, blobs.wrong[where]) > 0.95
    clean = {where[position] for position in found.clean_indices().tolist()}
    assert sorted(drawn.by_epoch[0]) == sorted(where)
    assert sorted(drawn.by_epoch[AT]) == sorted(drawn.by_epoch[AT + 1]) == sorted(clean)
    assert len(clean) < len(data)
    if isinstance(data, Together):
        assert data.asked > 0


COLORS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (240, 240, 20)]


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty pictures in a folder per color, of which every fifth is in a wrong one."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("pictures")
    for i in range(60):
        color = i % 4
        name = ["red", "green", "blue", "yellow"][color if i % 5 else (color + 1) % 4]
        (root / name).mkdir(exist_ok=True)
        shade = [min(255, channel + i % 7) for channel in COLORS[color]]
        image.new("RGB", (4, 4), tuple(shade)).save(root / name / f"{i:02}.png")
    return root


class Pictures(L.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_the_pictures_in_a_wrong_folder_are_named(folder):
    folders = pytest.importorskip("torchvision.datasets")
    data = folders.ImageFolder(folder, transform=to_tensor)
    partition = AttributionPartitionCallback(at_epoch=6, recipe="label")
    fit(Pictures(), DataLoader(data, 10, shuffle=True), [partition], max_epochs=7)
    named = {int(data.samples[index][0][-6:-4]) for index in partition.partition.suspect_indices().tolist()}
    assert named == set(range(0, 60, 5))


# What is refused, or fails with the data set's own words.


class Stream(IterableDataset):
    """As WebDataset's: samples come, and have no index."""

    def __iter__(self):
        return iter(Blobs())


class SizedStream(Stream):
    def __len__(self):
        return 203


class Uncounted(Dataset):
    def __getitem__(self, index):
        return Blobs()[index]


REFUSED = {
    "stream": (
        lambda: DataLoader(Stream(), 16),
        "Stream is an IterableDataset, .*; use a dataset with",
    ),
    "stream with a length": (lambda: DataLoader(SizedStream(), 16), "SizedStream is an IterableDataset"),
    "stream that loads itself": (SizedStream, "SizedStream is an IterableDataset"),
    "Hugging Face's": (
        lambda: DataLoader(hugging_face(Blobs()).with_format(None).to_iterable_dataset(), 16),
        "IterableDataset, whose samples have no index",
    ),
    "no length": (lambda: DataLoader(Uncounted(), 16, sampler=range(203)), "Uncounted has no __len__; add one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_without_index_or_length_is_refused_before_the_first_step(name):
    make, message = REFUSED[name]
    module = Pairs()
    with pytest.raises(TypeError, match=message):
        fit(module, make(), trio(AT))
    assert module.steps == 0


def test_without_any_sample_lightning_trains_nothing_and_says_so():
    partition, _, finetune = trio(AT)
    nothing = TensorDataset(torch.zeros(0, 16), torch.zeros(0, dtype=torch.int64))
    with pytest.warns(UserWarning, match="across ranks is zero"):
        fit(Toy(), DataLoader(nothing), [partition, finetune])
    assert not partition.has_result


class Changing(Blobs):
    """Another number of samples from the third epoch on."""

    more = 0

    def __len__(self):
        return 203 + self.more

    def __getitem__(self, index):
        return super().__getitem__(index % 203)


class Changes(L.Callback):
    def __init__(self, data, more):
        self.data, self.more = data, more

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.data.more = self.more


@pytest.mark.parametrize("more", [7, -20])
def test_a_data_set_must_keep_its_length(more):
    data = Changing()
    partition, prune, finetune = trio(AT + 1)
    with pytest.raises(ValueError, match=rf"Expected the 203 .* now has {203 + more}. It must keep its length"):
        fit(Toy(), DataLoader(data, 16, shuffle=True), [partition, prune, finetune, Changes(data, more)])
    assert not partition.has_result


class Broken(Blobs):
    """One file cannot be read; no draw of the fit asks for it."""

    def __getitem__(self, index):
        if index == 117:
            raise OSError("117.png is truncated")
        return super().__getitem__(index)


def test_a_sample_that_cannot_be_read_is_named_by_its_data_set_and_nothing_is_left_behind():
    loader = DataLoader(Broken(), 16, sampler=[index for index in range(203) if index != 117])
    before, module = dict(vars(loader)), Toy()
    with pytest.raises(OSError, match="is truncated"):
        fit(module, loader, trio(AT))
    assert vars(loader) == before
    assert module.training
    assert not any(part._forward_hooks for part in module.modules())
