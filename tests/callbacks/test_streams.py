"""Samples that are known by a key, as they have no dataset index."""

import copy
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Sampler

from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    DataFormat,
    Partition,
    SensitivityPruneCallback,
    UnlearnReport,
)
from lightning_unlearn.recipes import get_recipe
from tests.streams import OfDicts, Stream, finds, index_of, key_of, loader_of, narrow_net
from tests.toys import Blobs, assert_same_weights, convnet, fit, mlp, weights

BY_KEY = DataFormat(sample_key="key")
N = 240


def blobs(noise=0.2, **kwargs):
    return Blobs(N, noise, **kwargs)


def by_key(at_epoch=3, **kwargs):
    return AttributionPartitionCallback(at_epoch=at_epoch, data=BY_KEY, **kwargs)


@pytest.fixture(scope="module")
def found():
    """A fit that has narrowed its stream."""
    data, partition = blobs(), by_key()
    module = OfDicts()
    fit(module, loader_of(Stream(data)), [partition, CleanSubsetFinetuneCallback()], max_epochs=5)
    return data, partition, module


def test_wrong_labels_of_a_stream_are_found_by_key(found):
    data, callback, _ = found
    partition = callback.partition
    assert partition.keys == tuple(key_of(index) for index in range(N))
    assert finds(partition, data) > 0.97
    assert data.wrong[index_of(partition.keys)][~partition.is_clean].float().mean() > 0.9
    assert partition.indices_of([key_of(5), "another", key_of(0)]).tolist() == [5, -1, 0]


def test_rows_that_are_not_clean_are_taken_out_of_the_batches(found):
    _, callback, module = found
    everything = {key_of(index) for index in range(N)}
    kept = {callback.partition.keys[at] for at in callback.partition.trained_on().nonzero().flatten().tolist()}
    for epoch in range(5):
        assert module.keys_of(epoch) == (everything if epoch < 3 else kept)
    assert len(set(module.steps_by_epoch.values())) == 1, "as many steps as before"


def test_the_fit_is_bit_for_bit_the_same_until_the_partition_is_acted_upon():
    runs = []
    for callbacks in ([], [by_key()]):
        module = OfDicts(mlp)
        fit(module, loader_of(Stream(blobs())), callbacks, max_epochs=4)
        runs.append((weights(module), module.trained))
    assert_same_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_every_sample_is_drawn_with_its_probability_of_being_clean():
    data, partition, module = blobs(), by_key(), OfDicts()
    callbacks = [partition, CleanSubsetFinetuneCallback(on_noisy="reweight")]
    fit(module, loader_of(Stream(data)), callbacks, max_epochs=8)
    share = torch.zeros(N)
    for epoch in range(3, 8):
        share[index_of(module.keys_of(epoch))] += 1 / 5
    clean = partition.partition.clean_probability
    assert share[clean > 0.99].eq(1).all()
    assert share[clean < 0.01].sum() < 2


def test_labels_are_replaced_in_the_batch():
    data, partition, module = blobs(), by_key(), OfDicts()
    fit(module, loader_of(Stream(data)), [partition, CleanSubsetFinetuneCallback(on_noisy="relabel")], max_epochs=5)
    for epoch in range(5):
        keys, label = zip(*module.trained[epoch], strict=True)
        index = index_of(keys)
        if epoch < 3:
            assert torch.tensor(label).equal(data.y[index])
        else:
            # But for some that the partition has not found.
            assert (torch.tensor(label) == data.clean[index]).float().mean() > 0.97
    assert data.y[data.wrong].ne(data.clean[data.wrong]).all()


class Sorted(Stream):
    """The wrong ones come last, so that the last batches have nothing else."""

    def __iter__(self):
        for index in self.data.wrong.long().argsort(stable=True).tolist():
            yield self.item(index)


@pytest.mark.parametrize("net", [narrow_net, mlp])
def test_a_batch_of_which_nothing_is_left_teaches_nothing_and_is_a_step_like_others(net, caplog, tmp_path):
    data, before, moved = blobs(), {}, {}
    decided = [f"{key_of(at)},{'drop' if wrong else 'keep'}" for at, wrong in enumerate(data.wrong.tolist())]
    (tmp_path / "decided.csv").write_text("\n".join(["key,decision", *decided]))
    partition = by_key(review=tmp_path / "decided.csv")
    module = OfDicts(net, lambda one: torch.optim.SGD(one.parameters(), lr=0.1))

    class Moves(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            clean = not set(index_of(batch["key"]).tolist()) & set(data.wrong.nonzero().flatten().tolist())
            if trainer.current_epoch >= 3:
                same = all(p.equal(before[n]) for n, p in pl_module.named_parameters())
                moved.setdefault((clean, len(batch["key"])), []).append(not same)

    callbacks = [partition, CleanSubsetFinetuneCallback(warm_start="keep"), Moves()]
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(module, DataLoader(Sorted(data), batch_size=8), callbacks, max_epochs=5)
    assert (~partition.partition.trained_on()).equal(data.wrong)
    least = 2 if net is mlp else 1
    assert moved[True, 8] == [True] * len(moved[True, 8])
    assert moved[False, least] == [False] * len(moved[False, least])
    assert len(moved[False, least]) >= 10
    assert "batches had no row left and contributed a zero gradient" in caplog.text


class Backwards(Sampler):
    """One of a user's own, which cannot be narrowed."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(range(self.length - 1, -1, -1))


class Listed(torch.utils.data.Dataset):
    def __init__(self, stream):
        self.stream = stream

    def __len__(self):
        return len(self.stream.data)

    def __getitem__(self, index):
        return self.stream.item(index)


def as_tuples(items):
    return (
        [item["key"] for item in items],
        torch.stack([one["x"] for one in items]),
        torch.stack([one["label"] for one in items]),
    )


class OfTuples(OfDicts):
    def training_step(self, batch):
        return super().training_step(dict(zip(("key", "x", "label"), batch, strict=True)))


class OfSeveral(OfDicts):
    """Judges what comes from the loader ``noisy``; the other is beside."""

    def training_step(self, batch):
        assert len(batch["other"]["x"]) == 16
        return super().training_step(batch["noisy"])


def loaders(kind, data):
    """A module, its train loader, and how keys are found."""
    stream, listed = Stream(data), Listed(Stream(data))
    if kind == "workers":
        return OfDicts(), loader_of(stream, num_workers=2, persistent_workers=True), BY_KEY
    if kind == "a sampler of its own":
        return OfDicts(), loader_of(listed, sampler=Backwards(N)), BY_KEY
    if kind == "batches of the data set":
        return OfDicts(), DataLoader(Batched(stream), batch_size=None), BY_KEY
    if kind == "no loader of torch's":
        return OfDicts(), Batched(stream), BY_KEY
    if kind == "a function of tuples":
        return OfTuples(), loader_of(stream, collate_fn=as_tuples), DataFormat(sample_key=lambda batch: batch[0])
    if kind == "integers":
        return OfIntegers(), loader_of(Numbered(data)), BY_KEY
    several = {"noisy": loader_of(stream), "other": loader_of(listed, drop_last=True)}
    split = DataFormat(sample_key="noisy.key", batch_to_xy=lambda batch: (batch["noisy"]["x"], batch["noisy"]["label"]))
    return OfSeveral(), several, split


class Batched(torch.utils.data.IterableDataset):
    def __init__(self, stream):
        self.stream = stream

    def __iter__(self):
        yield from loader_of(self.stream)


class Numbered(Stream):
    def item(self, index):
        return super().item(index) | {"key": 1000 - index}


class OfIntegers(OfDicts):
    def training_step(self, batch):
        return super().training_step(batch | {"key": [key_of(1000 - key) for key in batch["key"].tolist()]})


KINDS = [
    "workers",
    "a sampler of its own",
    "batches of the data set",
    "no loader of torch's",
    "a function of tuples",
    "integers",
    "several loaders",
]


@pytest.mark.parametrize("kind", KINDS)
def test_loaders_whose_samples_have_no_index(kind):
    data = blobs()
    module, train, task_format = loaders(kind, data)
    partition = AttributionPartitionCallback(at_epoch=3, data=task_format)
    fit(module, train, [partition, CleanSubsetFinetuneCallback()], max_epochs=5)
    keys = partition.partition.keys
    keys = [key_of(1000 - key) for key in keys] if kind == "integers" else keys
    assert finds(partition.partition, data, keys) > 0.95
    kept = {key for key, is_kept in zip(keys, partition.partition.trained_on().tolist(), strict=True) if is_kept}
    assert module.keys_of(4) <= kept
    assert len(module.keys_of(2)) > len(module.keys_of(4)) > 0.6 * N


class Renamed(Stream):
    """Other keys in every epoch."""

    def item(self, index):
        return super().item(index) | {"key": f"{self.epoch}/{index}"}


class ByClass(Stream):
    def item(self, index):
        return super().item(index) | {"key": f"class {index % 3}"}


class Unnamed(Stream):
    def item(self, index):
        return super().item(index) | {"key": "" if index == 7 else key_of(index)}


class Mixing(OfDicts):
    def training_step(self, batch):
        share, other = 0.5, torch.randperm(len(batch["x"]))
        logits = self(share * batch["x"] + (1 - share) * batch["x"][other])
        one, two = (nn.functional.cross_entropy(logits, batch["label"][of]) for of in (slice(None), other))
        return share * one + (1 - share) * two


@pytest.mark.parametrize(
    ("make", "epochs", "said"),
    [
        (
            lambda data: (OfDicts(), Renamed(data)),
            1,
            "none of the 240 keys of this epoch is among the 240 keys of earlier",
        ),
        (lambda data: (OfDicts(), ByClass(data)), 0, "Expected each key to identify one sample with a fixed label"),
        (lambda data: (OfDicts(), Unnamed(data)), 0, "Expected a key for each sample, but in 'key' row"),
        (lambda data: (Mixing(), Stream(data)), 0, "the loss pulls .* towards a class other"),
    ],
)
def test_keys_or_steps_of_no_use_end_the_fit_early(make, epochs, said):
    module, stream = make(blobs())
    with pytest.raises(Exception, match=said):
        fit(module, loader_of(stream, 8), [by_key(at_epoch=6)], max_epochs=8)
    assert module.current_epoch == epochs
    assert "_on_before_batch_transfer" not in vars(module), "all is put back"


def test_a_wrong_name_ends_the_fit_before_the_first_step():
    module = OfDicts()
    with pytest.raises(TypeError, match="Expected sample_key='name' to name a field of a training batch"):
        fit(module, loader_of(Stream(blobs())), [AttributionPartitionCallback(data=DataFormat(sample_key="name"))])
    assert not module.trained


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"layer": "net.0"}, "layer cannot be combined with sample_key"),
        ({"recipe": "rlap"}, "recipe='rlap'"),
        ({"recipe": "input"}, "recipe='input'"),
        ({"recipe": get_recipe("auto", evidence_from="eval_passes")}, "evidence_from='eval_passes'"),
        ({"recipe": get_recipe("auto", input_layer="net.0")}, "input_layer"),
        ({"every_n_epochs": 2}, "every_n_epochs"),
        ({"judge_validation": True}, "judge_validation=True"),
    ],
)
def test_settings_that_need_a_pass_are_refused_at_once(setting, said):
    with pytest.raises(ValueError, match=said):
        by_key(**setting)


def test_pruning_which_needs_a_pass_is_refused_before_the_first_step():
    module = OfDicts()
    with pytest.raises(MisconfigurationException, match="SensitivityPruneCallback ranks neurons by a pass over the"):
        fit(module, loader_of(Stream(blobs())), [by_key(), SensitivityPruneCallback()])
    assert not module.trained


def test_a_function_for_several_loaders_is_refused_as_it_does_not_say_whose_rows_go():
    module, train, _ = loaders("several loaders", blobs())
    task_format = DataFormat(
        sample_key=lambda batch: batch["noisy"]["key"],
        batch_to_xy=lambda batch: (batch["noisy"]["x"], batch["noisy"]["label"]),
    )
    with pytest.raises(TypeError, match=r"to name one loader, .* such as 'noisy\.key'"):
        fit(module, train, [AttributionPartitionCallback(at_epoch=1, data=task_format), CleanSubsetFinetuneCallback()])
    assert not module.trained


@pytest.mark.parametrize("recipe", ["aum", "loss", "argmax", "label", lambda evidence: evidence.aum.sigmoid()])
def test_recipes_that_need_no_pass(recipe):
    data, partition = blobs(), by_key(recipe=recipe)
    fit(OfDicts(), loader_of(Stream(data)), [partition], max_epochs=4)
    assert finds(partition.partition, data) > 0.9


class Several(OfDicts):
    def training_step(self, batch):
        return nn.functional.binary_cross_entropy_with_logits(self(batch["x"]), batch["label"].float())


class OfSeveralLabels(Stream):
    def item(self, index):
        return super().item(index) | {"label": torch.nn.functional.one_hot(self.data.y[index], 4)}


def test_several_labels_are_judged_each_by_itself():
    data = blobs()
    partition = AttributionPartitionCallback(at_epoch=6, data=DataFormat(sample_key="key", task="multilabel"))
    fit(Several(), loader_of(OfSeveralLabels(data)), [partition], max_epochs=7)
    found = partition.partition
    assert found.label.equal(nn.functional.one_hot(data.y[index_of(found.keys)], 4))
    score = 1 - found.clean_probability
    assert finds(copy_with(found, data), data) > 0.9
    assert score.shape == (N,)


def copy_with(found, data):
    """With one label for each sample, to compare."""
    other = copy.copy(found)
    object.__setattr__(other, "label", data.y[index_of(found.keys)])
    return other


class SaveAt(L.Callback):
    """Writes a checkpoint when so many epochs are complete."""

    def __init__(self, at, path):
        self.at, self.path = at, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_fit_goes_on_from_a_checkpoint(tmp_path, at):
    ends = []
    for resumed in (False, True):
        data, partition, module, stream = blobs(), by_key(), OfDicts(), Stream(blobs())
        callbacks = [partition, CleanSubsetFinetuneCallback(on_noisy="relabel")]
        if not resumed:
            fit(module, loader_of(stream), [*callbacks, SaveAt(at, tmp_path / f"{at}.ckpt")], max_epochs=5)
        else:
            stream.epoch = at
            fit(module, loader_of(stream), callbacks, max_epochs=5, ckpt_path=tmp_path / f"{at}.ckpt")
        ends.append((weights(module), partition.partition, module.trained[4]))
        assert finds(partition.partition, data) > 0.95
    assert ends[0][1].keys == ends[1][1].keys
    assert ends[0][1].clean_probability.equal(ends[1][1].clean_probability)
    assert ends[0][2] == ends[1][2]
    assert_same_weights(ends[0][0], ends[1][0])


def test_a_partition_by_key_is_written_read_and_reviewed(found, tmp_path):
    data, callback, _ = found
    partition = callback.partition
    partition.save(tmp_path / "partition.npz")
    again = Partition.load(tmp_path / "partition.npz")
    assert again.keys == partition.keys
    assert Partition.from_state_dict(partition.state_dict()).keys == partition.keys
    partition.to_csv(tmp_path / "suspects.csv", suspects_only=False)
    titles, *rows = (tmp_path / "suspects.csv").read_text(encoding="utf-8-sig").splitlines()
    assert titles.startswith("index,key,given_label,")
    first = partition.keys[int(partition.suspect_indices()[0])]
    assert rows[0].split(",")[1] == first

    kept, dropped = (
        partition.keys[int(partition.suspect_indices()[0])],
        partition.keys[int(partition.clean_indices()[0])],
    )
    table = tmp_path / "decided.csv"
    table.write_text(f"key,decision\n{kept},keep\n{dropped},drop\nnever-seen,drop\n")
    reviewed, module = by_key(review=table), OfDicts()
    with pytest.warns(UserWarning, match=r"Ignoring 1 decisions in .* not seen before the partition \('never-seen'\)"):
        fit(module, loader_of(Stream(data)), [reviewed, CleanSubsetFinetuneCallback()], max_epochs=5)
    at = reviewed.partition.indices_of([kept, dropped])
    assert reviewed.partition.is_clean[at].tolist() == [True, False]
    assert kept in module.keys_of(4)
    assert dropped not in module.keys_of(4)


@pytest.mark.parametrize("at_epoch", [3, 5])
def test_the_report_shows_the_samples_that_have_come_again_by_their_keys(tmp_path, at_epoch):
    data, partition = blobs(image=True), by_key(at_epoch=at_epoch)
    fit(OfDicts(convnet), loader_of(Stream(data)), [partition, UnlearnReport(tmp_path)], max_epochs=5)
    cards = json.loads((tmp_path / "gallery.json").read_text())["samples"]
    suspects = [partition.partition.keys[at] for at in partition.partition.suspect_indices().tolist()]
    assert {card["file"] for card in cards.values()} == set(suspects)
    kind, text = ("table", "") if at_epoch == 3 else ("text", "No batch contained it after the partition.")
    for card in cards.values():
        assert (card["kind"], card.get("text", "")) == (kind, text)
    assert "blob-" in (tmp_path / "report.html").read_text()
    assert next(iter((tmp_path / "partition.npz").parent.glob("*.npz"))), "the record has the partition"


def test_a_table_by_index_does_not_fit_a_stream_nor_one_by_key_a_data_set(found, tmp_path):
    partition = found[1].partition
    partition.to_csv(tmp_path / "found.csv")
    text = (tmp_path / "found.csv").read_text().replace(",drop,,", ",drop,drop,")
    (tmp_path / "found.csv").write_text(text)
    with pytest.raises(ValueError, match="to belong to this training set of 240 samples, but it belongs to another"):
        fit(
            OfDicts(),
            loader_of(Listed(Stream(blobs())), shuffle=True),
            [AttributionPartitionCallback(at_epoch=1, review=tmp_path / "found.csv")],
        )
    by_index, of_keys = tmp_path / "index.csv", tmp_path / "key.csv"
    by_index.write_text("index,decision\n3,drop\n")
    of_keys.write_text("key,decision\nblob-0003,drop\n")
    with pytest.raises(ValueError, match="line 2: expected the key of the sample"):
        fit(OfDicts(), loader_of(Stream(blobs())), [by_key(review=by_index)])
    with pytest.raises(ValueError, match=r"line 2: expected index to lie in \[0, 240\), but it is left out"):
        fit(
            OfDicts(),
            loader_of(Listed(Stream(blobs())), shuffle=True),
            [AttributionPartitionCallback(at_epoch=1, review=of_keys)],
        )


def test_a_checkpoint_by_index_is_not_gone_on_from_by_key(tmp_path):
    listed, path = Listed(Stream(blobs())), tmp_path / "first.ckpt"
    by_index = AttributionPartitionCallback(at_epoch=3)
    fit(OfDicts(), loader_of(listed, shuffle=True), [by_index, SaveAt(1, path)])
    with pytest.raises(MisconfigurationException, match="Expected a checkpoint of a fit with sample_key"):
        fit(OfDicts(), loader_of(Stream(blobs())), [by_key()], ckpt_path=path)
