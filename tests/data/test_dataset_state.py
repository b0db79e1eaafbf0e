"""A data set that opens something with its first item does so in the process that reads, and not in the main one."""

import os

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_unlearn import UnlearnReport
from lightning_unlearn.data.dataset_state import unopened
from tests.toys import Blobs, Toy, fit
from tests.toys import quick_trio as trio


class File:
    """What only the process that has opened it may read, as an archive or an HDF5 file."""

    def __init__(self):
        self.opened_by = os.getpid()

    def read(self):
        assert self.opened_by == os.getpid(), "read by another process than the one that has opened it"


class Reader:
    def __init__(self):
        self.file = None

    def read(self):
        self.file = self.file or File()
        self.file.read()


class Opening(Blobs):
    """Opens files in the ways that are common: in an attribute, by path, in a list, by who reads for it."""

    def __init__(self):
        super().__init__()
        self.file, self.is_open, self.files, self.parts, self.reader = None, False, {}, [None, None], Reader()

    def __getitem__(self, index):
        if not self.is_open:
            self.file, self.is_open = File(), True
            self.extra = File()
        self.parts[index % 2] = self.parts[index % 2] or File()
        for file in (self.file, self.extra, self.parts[index % 2], self.files.setdefault("a", File()), self.reader):
            file.read()
        return super().__getitem__(index)


def untouched(data):
    return (
        data.file is None
        and not data.is_open
        and data.files == {}
        and data.parts == [None, None]
        and data.reader.file is None
        and not hasattr(data, "extra")
    )


WITHIN = {
    "itself": lambda data: data,
    "subset": lambda data: Subset(Subset(data, range(200)), range(150)),
    "concatenated": lambda data: ConcatDataset([data, Blobs(20)]),
}


@pytest.mark.parametrize("name", WITHIN)
def test_workers_open_files_themselves(name, tmp_path):
    data, module = Opening(), Toy()
    loader = DataLoader(WITHIN[name](data), 16, shuffle=True, num_workers=1)
    report = UnlearnReport(str(tmp_path / "report.html"))
    partition, *others = trio(1, finetune={"on_noisy": "relabel"})
    fit(module, loader, [partition, *others, report], max_epochs=3)
    assert partition.partition is not None
    assert untouched(data)


def test_without_workers_the_main_process_keeps_what_it_has_opened():
    data = Opening()
    with unopened(DataLoader(data, 16)):
        data[0]
    assert not untouched(data)


def test_it_is_put_back_after_an_error():
    data = Opening()
    with pytest.raises(IndexError), unopened(DataLoader(data, 16, num_workers=1)):
        data[10_000]
    assert untouched(data)


def test_what_was_open_before_stays_as_it_is_now():
    data = Opening()
    data[0], data[1]
    with unopened(DataLoader(data, 16, num_workers=1)):
        data.file = other = File()  # as where one file is closed for another: the closed one is of no use
    assert data.file is other


class Strange(Dataset):
    """Refers to itself, and holds objects of torch and of no attributes."""

    def __init__(self):
        self.me, self.tensor, self.slotted, self.many = [self], torch.zeros(3), object(), [None] * 20_000

    def __getitem__(self, index):
        return self.tensor

    def __len__(self):
        return 20


def test_what_refers_to_itself_or_is_long_is_no_trouble():
    data = Strange()
    with unopened(DataLoader(data, num_workers=1)):
        data.many[0] = 1
        data.me.append(1)
        data.late = 1
    assert data.many[0] == 1
    assert data.me == [data, 1]
    assert not hasattr(data, "late")
