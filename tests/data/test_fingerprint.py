import itertools
import random
from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from lightning_unlearn.data.fingerprint import SAMPLED, check_fingerprint, fingerprint, sampled_indices, share_changed

Sample = namedtuple("Sample", "x y")


@dataclass
class Record:
    x: torch.Tensor
    names: list = field(default_factory=list)


def image(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8))


KINDS = {
    "tuple": lambda k: (torch.arange(3.0) + k, k),
    "list": lambda k: [torch.arange(3.0) + k, torch.tensor(k)],
    "named tuple": lambda k: Sample(torch.arange(3.0) + k, k),
    "dict": lambda k: {"input_ids": [k, 2, 3], "text": f"sample {k}", "label": 0},
    "nested": lambda k: {"image": {"pixels": np.arange(4) * k}, "meta": (None, True)},
    "dataclass": lambda k: Record(torch.ones(2) * k, ["a"]),
    "PIL": lambda k: (image(k), 1),
    "numpy": lambda k: (np.full((2, 2), k, dtype=np.float32), np.int64(1)),
    "objects in numpy": lambda k: np.array([f"word {k}", None], dtype=object),
    "bfloat16": lambda k: (torch.full((2,), k, dtype=torch.bfloat16), 1),
    "bool": lambda k: (torch.arange(40) == k, 1),
    "scalar": torch.tensor,
    "strided": lambda k: (torch.arange(12.0).reshape(3, 4).t() * k, 1),
    "needs grad": lambda k: (torch.ones(2, requires_grad=True) * k, 1),
}


class Items:
    def __init__(self, make, total=40):
        self.make, self.total, self.read = make, total, []

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        self.read.append(index)
        return self.make(index)


def of(make, total=40, **loader):
    return fingerprint(DataLoader(Items(make, total), **loader))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_items_have_the_same_fingerprint_and_others_another(kind):
    make = KINDS[kind]
    found = of(make)
    assert found == of(make)
    assert share_changed(found, of(lambda k: make(k + 1))) == 1.0
    # Of what it cannot read it would know the class alone, the same of all.
    assert len({found.split(":")[1][at : at + 8] for at in range(0, 8 * SAMPLED, 8)}) == SAMPLED


def test_the_folder_of_a_path_does_not_count():
    def at(folder, name="{}.png"):
        return of(lambda k: (torch.zeros(2), f"{folder}/{name.format(k)}"))

    assert at("/scratch/rank0") == at("/scratch/rank1")
    assert share_changed(at("/scratch/rank0"), at("/scratch/rank0", "a{}.png")) == 1.0
    assert share_changed(at("good"), at("bad")) == 1.0


def test_it_is_small():
    assert len(of(KINDS["PIL"], 40)) == 3 + 8 * SAMPLED


def test_type_and_shape_count_as_content():
    floats = of(lambda k: torch.zeros(4))
    for other in (torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2), [torch.zeros(4)], torch.zeros(4).numpy() + 1):
        assert share_changed(floats, of(lambda k, other=other: other)) == 1.0
    assert of(lambda k: ["ab", "c"]) != of(lambda k: ["a", "bc"])


@pytest.mark.parametrize("total", [1, 2, 10, 15, 16, 17, 101, 10**12])
def test_sampled_items_reach_from_the_first_to_the_last(total):
    index = sampled_indices(total).tolist()
    assert index == sorted(set(index))
    assert len(index) == min(total, SAMPLED)
    assert (index[0], index[-1]) == (0, total - 1)


def test_it_reads_16_items_twice():
    items = Items(lambda k: k, 101)
    fingerprint(DataLoader(items, batch_size=4, num_workers=2))  # without an initialization of the workers, none starts
    assert items.read == sampled_indices(101).tolist() * 2


OWN = np.random.default_rng(1)
AUGMENTED = {
    "torch": lambda k: torch.rand(2),
    "numpy": lambda k: np.random.rand(2),  # noqa: NPY002
    "python": lambda k: random.random(),
    "own generator": lambda k: OWN.random(),
    "a flip": lambda k: k if random.random() < 0.5 else -1 - k,
}


@pytest.mark.parametrize("kind", AUGMENTED)
def test_random_augmentation_leaves_the_length_alone(kind):
    found = of(AUGMENTED[kind])
    assert found == "40:"
    check_fingerprint(found, of(AUGMENTED[kind]))
    check_fingerprint(found, of(KINDS["tuple"]))
    check_fingerprint(of(KINDS["tuple"]), found)


def test_rare_augmentation_from_a_generator_of_its_own_is_not_taken_for_other_data():
    own = np.random.default_rng(0)
    found = [of(lambda k: k if own.random() < 0.98 else -1) for _ in range(200)]
    assert sum(value != "40:" for value in found) > 50  # seen twice alike
    for before, now in itertools.pairwise(found):
        check_fingerprint(before, now)


def test_another_length_or_other_content_is_refused():
    found = of(KINDS["dict"])
    with pytest.raises(ValueError, match=r"Expected the training data .*, but 100% of 16 sampled items"):
        check_fingerprint(found, of(lambda k: KINDS["dict"](k + 1)))
    with pytest.raises(ValueError, match="train without ckpt_path"):
        check_fingerprint(found, of(KINDS["dict"], 41))
    shifted = of(lambda k: KINDS["dict"](k + (k > 30)))  # one removed, and one added at the end
    assert share_changed(found, shifted) == pytest.approx(4 / 16)
    check_fingerprint(found, shifted)
    check_fingerprint("", found)


class NeedsItsWorker:
    """As a data set that opens its file in the worker."""

    is_open = False

    def __len__(self):
        return 20

    def __getitem__(self, index):
        assert self.is_open
        return index


def opens(worker):
    get_worker_info().dataset.is_open = True


def test_where_workers_are_initialized_it_reads_in_one():
    data = NeedsItsWorker()
    found = fingerprint(DataLoader(data, num_workers=2, worker_init_fn=opens))
    assert found == of(lambda k: k, 20)
    assert not data.is_open


class Moves(DataLoader):
    """A loader that takes its batches for tensors."""

    def __iter__(self):
        for batch in super().__iter__():
            yield batch.to("cpu")


def test_a_loader_of_the_users_own_class_is_not_iterated():
    items = Items(torch.tensor)
    assert fingerprint(Moves(items)) == of(torch.tensor)


def test_what_it_does_not_know_counts_by_its_class():
    sparse = torch.eye(3).to_sparse()
    assert share_changed(of(lambda k: object()), of(lambda k: object())) == 0
    assert share_changed(of(lambda k: sparse), of(lambda k: sparse)) == 0
