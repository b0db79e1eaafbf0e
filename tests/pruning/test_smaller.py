"""The smaller network that a fit leaves."""

import logging
import sys
import warnings

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_unlearn import SensitivityPruneCallback
from lightning_unlearn.shrinking import load_shrunk
from tests.callbacks import forked
from tests.callbacks.published import Published, make_partition
from tests.toys import Blobs, BlobsData, Toy, adamw, fit, make_trainer, weights


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    return lambda: [record.getMessage() for record in caplog.records]


def net():
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))


def callbacks(data, path, dry=False, **arguments):
    probability = torch.rand(101, generator=torch.Generator().manual_seed(1))
    published = Published(make_partition(probability, data.y), dry_run=dry)
    prune = {"criterion": "random", "amount": 0.5, "max_val_drop": None, **arguments}
    return [published, SensitivityPruneCallback(["net.0", "net.2"], shrink_to=path, **prune)]


def run(path, module=None, **arguments):
    data, toy = Blobs(101), module or Toy(net, adamw)
    fit(toy, BlobsData(data), ours := callbacks(data, path, **arguments), max_epochs=3)
    return toy, ours[1], data


def outputs(module, x):
    with torch.no_grad():
        return module.eval()(x)


def test_it_answers_as_the_fits_module_does(tmp_path, said):
    path = tmp_path / "made" / "small.pt"
    module, prune, data = run(path)
    small = load_shrunk(Toy(net), path)
    assert (small.net[0].out_features, small.net[2].out_features, small.net[2].in_features) == (10, 6, 10)
    torch.testing.assert_close(outputs(small, data.x), outputs(module, data.x))
    count = sum(p.numel() for p in small.parameters())
    assert (
        f"{path} holds the network without its pruned neurons: {count} of 644 parameters. load_shrunk reads it."
        in said()
    )
    # The fit's own module keeps its shapes.
    assert module.net[0].out_features == 20
    assert prune.settings()["shrink_to"] == str(path)


def test_a_fit_is_the_same_without_it(tmp_path):
    with_it, without = run(tmp_path / "small.pt")[0], run(None)[0]
    assert all(value.equal(weights(without)[name]) for name, value in weights(with_it).items())


@pytest.mark.parametrize("arguments", [{"dry": True}, {"criterion": "sensitivity"}])
def test_where_no_neuron_is_pruned_nothing_is_written(tmp_path, arguments, said):
    run(tmp_path / "small.pt", **arguments)
    assert f"No neurons pruned: {tmp_path / 'small.pt'} was not written." in said()
    assert not (tmp_path / "small.pt").exists()


OLDER = "a network of last week"


@pytest.mark.parametrize("arguments", [{"dry": True}, {"criterion": "sensitivity"}, {}])
def test_a_file_of_an_earlier_fit_is_named_before_the_first_step_and_where_it_stays(tmp_path, arguments, said):
    path, first = tmp_path / "small.pt", []
    path.write_text(OLDER)

    class Notes(Toy):
        def on_train_batch_start(self, batch, batch_idx):
            first.append(told())

    def told():
        return [line for line in (*said(), *(str(one.message) for one in caught)) if str(path) in line]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(path, Notes(net, adamw), **arguments)
    (before,) = first[0]
    assert before.startswith(f"{path} exists (written ")
    assert ("so it is not replaced" in before) is bool(arguments.get("dry"))
    stays = [line for line in told() if "was not written. The existing file (written" in line]
    assert (path.read_bytes() == OLDER.encode()) is (len(stays) == 1) is bool(arguments)


def test_a_resumed_fit_writes_it_too(tmp_path):
    data, module = Blobs(101), Toy(net, adamw)
    trainer = fit(module, BlobsData(data), callbacks(data, None), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Toy(net, adamw)
    ours = callbacks(data, tmp_path / "small.pt")
    fit(again, BlobsData(data), ours, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    small = load_shrunk(Toy(net), tmp_path / "small.pt")
    torch.testing.assert_close(outputs(small, data.x), outputs(again, data.x))


def test_what_cannot_be_shrunk_is_refused_before_the_first_step(tmp_path):
    steps = []

    class Detached(Toy):
        def forward(self, x):
            return super().forward(x).detach()

        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(ValueError, match="Expected a Detached that torch-pruning can trace"):
        run(tmp_path / "small.pt", Detached(net, adamw))
    with pytest.raises(ValueError, match=r"Expected a file to write, but .* is a folder"):
        run(tmp_path)
    assert steps == []


class TwoBlocks(nn.Module):
    """What the blocks add is heard through a sum, what their first layers put out only in the second."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(16, 20), nn.Linear(20, 4)
        self.first, self.second = nn.Linear(20, 12), nn.Linear(12, 20)

    def forward(self, x):
        h = self.stem(x).relu()
        return self.head(h + self.second(self.first(h).relu()).relu())


@pytest.mark.parametrize("layer", [None, "net.second"])
def test_layers_that_stay_as_large_are_refused_before_the_first_step(tmp_path, layer):
    data, module = Blobs(101), Toy(TwoBlocks, adamw)
    ours = callbacks(data, tmp_path / "small.pt")
    ours[1].layer, before = layer, weights(module)
    with pytest.raises(ValueError, match=r"shrink_to has no effect: pruned neurons of '.*Name layers"):
        fit(module, BlobsData(data), ours, max_epochs=3)
    assert module.steps == 0
    assert all(value.equal(before[name]) for name, value in weights(module).items())


def test_of_several_layers_those_that_stay_are_named_before_the_first_step(tmp_path):
    data, module = Blobs(101), Toy(TwoBlocks, adamw)
    ours = callbacks(data, tmp_path / "small.pt")
    ours[1].layer = ["net.first", "net.second"]
    with pytest.warns(UserWarning, match=r"will keep some of the pruned neurons.* in 'net.second'"):
        fit(module, BlobsData(data), ours, max_epochs=3)
    assert load_shrunk(Toy(TwoBlocks), tmp_path / "small.pt").net.first.out_features == 6


@pytest.mark.parametrize(
    ("layers", "joined"),
    [
        (["net.stem", "net.second"], "'net.stem', 'net.second'"),
        (["net.stem", "net.first", "net.second"], "'net.stem', 'net.second'"),
        (["net.first"], None),
    ],
)
def test_layers_of_one_residual_sum_are_named_before_the_first_step(tmp_path, layers, joined, said):
    class Stops(Exception):
        pass

    class NoStep(Toy):
        def training_step(self, batch):
            raise Stops

    data, before = Blobs(101), weights(module := NoStep(TwoBlocks, adamw))
    ours = callbacks(data, tmp_path / "small.pt")
    ours[1].layer = layers
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(Stops):
            fit(module, BlobsData(data), ours, max_epochs=3)
    told = [str(one.message) for one in caught if "small.pt will keep" in str(one.message)]
    assert [line.partition(": the outputs")[0].partition("neurons of ")[2] for line in told] == [joined] * bool(joined)
    assert all(value.equal(before[name]) for name, value in weights(module).items())


def test_without_torch_pruning_the_extra_is_named_when_the_fit_is_set_up(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match="pip install torch-pruning"):
        run(tmp_path / "small.pt")


def test_a_path_that_is_none_is_refused_by_name():
    with pytest.raises(ValueError, match="Expected shrink_to to be the path of a file to write, but got 3"):
        SensitivityPruneCallback(shrink_to=3)


def test_where_ranks_hold_parts_of_the_weights_it_is_refused_by_name(tmp_path):
    from lightning.pytorch.strategies import ModelParallelStrategy

    data = Blobs(101)
    prune = callbacks(data, tmp_path / "small.pt")
    trainer = make_trainer(callbacks=prune)
    prune[1].setup(trainer, Toy(net), "fit")
    trainer.strategy.__class__ = type("Parts", (ModelParallelStrategy,), {})
    with pytest.raises(MisconfigurationException, match=r"SensitivityPruneCallback\(shrink_to=\.\.\.\) does not work"):
        prune[1].validate_setup(trainer, Toy(net))


def fit_on_two_ranks(folder, devices):
    data, module = Blobs(101), Toy(net, adamw)
    ours = callbacks(data, folder / "small.pt")
    trainer = fit(module, BlobsData(data), ours, max_epochs=3, devices=devices, strategy="ddp")
    torch.save(module.state_dict(), folder / f"{trainer.global_rank}.pt")
    refused = callbacks(data, folder)
    try:
        fit(Toy(net, adamw), BlobsData(data), refused, max_epochs=3, devices=devices, strategy="ddp")
    except ValueError as error:
        (folder / f"refused-{trainer.global_rank}").write_text(str(error))


@pytest.mark.ddp
def test_two_processes_write_one_network_and_refuse_on_both(tmp_path):
    done = forked.launch(fit_on_two_ranks, tmp_path, 2)
    assert (tmp_path / "refused-1").exists(), done.stderr[-4000:]
    module, data = Toy(net), Blobs(101)
    module.load_state_dict(torch.load(tmp_path / "1.pt", weights_only=True))
    small = load_shrunk(Toy(net), tmp_path / "small.pt")
    assert small.net[0].out_features == 10
    torch.testing.assert_close(outputs(small, data.x), outputs(module, data.x))
    assert all("is a folder" in (tmp_path / f"refused-{rank}").read_text() for rank in (0, 1))
