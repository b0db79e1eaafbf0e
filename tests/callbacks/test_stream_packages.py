"""Streams of other packages, each skipped by name where it is not installed: ``pip install -e ".[all,dev,stream]"``."""

import io
import sys
import tarfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, DataFormat
from tests.streams import OfDicts, finds, key_of, loader_of
from tests.toys import Blobs, fit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

N = 240
BY_KEY = DataFormat(sample_key="key")
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def of_webdataset(data, folder):
    """Two shards of tar files, read with a shuffle; the key is that of the file within."""
    webdataset = pytest.importorskip("webdataset")
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as archive:
            for index in range(shard, N, 2):
                row = io.BytesIO()
                np.save(row, data.x[index].numpy())
                for name, content in (("npy", row.getvalue()), ("cls", str(int(data.y[index])).encode())):
                    member = tarfile.TarInfo(f"{key_of(index)}.{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))

    def as_dict(sample):
        return {"__key__": sample["__key__"], "x": torch.from_numpy(sample["npy"]), "label": sample["cls"]}

    shards = [str(folder / f"shard-{shard}.tar") for shard in range(2)]
    stream = webdataset.WebDataset(shards, shardshuffle=2, seed=0, empty_check=False)
    return webdataset.WebLoader(stream.shuffle(100).decode().map(as_dict), batch_size=16), "__key__"


def optimized(data, folder):
    # As litdata.optimize writes it, without its processes.
    writer = pytest.importorskip("litdata.streaming.writer").BinaryWriter(str(folder), chunk_size=64)
    for index in range(N):
        writer[index] = {"key": key_of(index), "x": data.x[index].clone(), "label": int(data.y[index])}
    writer.done()
    writer.merge()


def of_litdata(data, folder):
    optimized(data, folder)
    return loader_of_litdata(folder), "key"


def loader_of_litdata(folder):
    litdata = pytest.importorskip("litdata")
    return litdata.StreamingDataLoader(litdata.StreamingDataset(str(folder), shuffle=True, seed=1), batch_size=16)


def of_litdata_in_torchs_loader(data, folder):
    optimized(data, folder)
    litdata = pytest.importorskip("litdata")
    return loader_of(litdata.StreamingDataset(str(folder), shuffle=True, seed=1)), "key"


def of_torchdata(data, folder):
    """Nodes that sample, read, batch and collate; the loader of nodes is none of torch's."""
    nodes = pytest.importorskip("torchdata.nodes")
    read = nodes.Mapper(
        nodes.SamplerWrapper(torch.utils.data.RandomSampler(range(N))),
        lambda index: {"key": index, "x": data.x[index], "label": data.y[index]},
    )
    batches = nodes.Mapper(nodes.Batcher(read, 16, drop_last=False), torch.utils.data.default_collate)
    return nodes.Loader(batches), "key"


def of_hugging_face(data, folder):
    """A stream that is shuffled with a buffer, and formatted as tensors."""
    datasets = pytest.importorskip("datasets")
    rows = {"id": [key_of(index) for index in range(N)], "x": data.x.tolist(), "label": data.y.tolist()}
    stream = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=3)
    return loader_of(stream.shuffle(seed=0, buffer_size=64).with_format("torch")), "id"


class Net(OfDicts):
    """Knows keys under any name."""

    def training_step(self, batch):
        keys = next(batch[name] for name in ("key", "__key__", "id") if name in batch)
        keys = [key_of(key) for key in keys.tolist()] if isinstance(keys, torch.Tensor) else keys
        return super().training_step({"key": keys, "x": batch["x"], "label": batch["label"]})


KINDS = [of_webdataset, of_litdata, of_litdata_in_torchs_loader, of_torchdata, of_hugging_face]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("on_noisy", ["drop", "relabel"])
def test_streams_of_other_packages(kind, on_noisy, tmp_path):
    data = Blobs(N, 0.2)
    train, key = kind(data, tmp_path)
    partition, module = AttributionPartitionCallback(at_epoch=3, data=DataFormat(sample_key=key)), Net()
    fit(module, train, [partition, CleanSubsetFinetuneCallback(on_noisy=on_noisy)], max_epochs=5)
    found = partition.partition
    keys = [key_of(one) if isinstance(one, int) else one for one in found.keys]
    assert sorted(keys) == [key_of(index) for index in range(N)]
    assert finds(found, data, keys) > 0.95
    kept = found.trained_on() | (found.relabel_mask(0.7) if on_noisy == "relabel" else False)
    for epoch in range(3, 5):
        assert module.keys_of(epoch) == {one for one, is_kept in zip(keys, kept.tolist(), strict=True) if is_kept}


def test_a_litdata_stream_is_resumed_within_an_epoch(tmp_path):
    data, ends = Blobs(N, 0.2), []
    optimized(data, tmp_path / "data")
    for goes_on in (False, True):
        train = loader_of_litdata(tmp_path / "data")
        partition, path = AttributionPartitionCallback(at_epoch=3, data=BY_KEY), tmp_path / "middle.ckpt"
        callbacks = [partition] if goes_on else [partition, SaveAtStep(20, path)]
        fit(Net(), train, callbacks, max_epochs=4, ckpt_path=path if goes_on else None)
        ends.append(partition.partition)
    assert ends[0].keys == ends[1].keys
    assert finds(ends[1], data) > 0.95


class SaveAtStep(L.Callback):
    def __init__(self, at, path):
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def test_the_packages_are_those_of_the_extra():
    """So that a job that installs it runs every test of this file."""
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [line.partition(">")[0] for line in extras["stream"]] == ["datasets", "litdata", "torchdata", "webdataset"]
