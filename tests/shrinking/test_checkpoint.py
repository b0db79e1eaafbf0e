import importlib
import pickle
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_unlearn import shrink
from lightning_unlearn.shrinking import FORMAT, load_shrunk, save_shrunk
from tests.callbacks import forked
from tests.shrinking.nets import (
    IMAGES,
    X,
    lived_in,
    outputs,
    perceptron,
    separable,
    silence,
)
from tests.toys import (
    Toy,
    assert_same_weights,
    convnet,
    weights,
)


def shrunk_convnet():
    net = lived_in(convnet())
    silence(net[0], net[1])
    silence(net[6], neurons=[5])
    return shrink(net, IMAGES)


@pytest.mark.parametrize("make", [convnet, separable])
def test_saved_and_loaded(tmp_path, make):
    net = lived_in(make())
    silence(*((net[0], net[1]) if make is convnet else (net[3], net[4])))
    small = shrink(net, IMAGES)
    path = tmp_path / "a" / "b" / "small.pt"
    save_shrunk(small, path)
    fresh = make()
    fresh[0].weight.requires_grad_(False)
    loaded = load_shrunk(fresh, path)
    assert loaded is fresh
    assert_same_weights(weights(small), weights(loaded))
    # str tells the integer attributes.
    assert str(loaded) == str(small)
    assert not loaded[0].weight.requires_grad
    assert torch.equal(outputs(loaded, IMAGES), outputs(small, IMAGES))
    loaded(IMAGES).sum().backward()


def leaves(x):
    return [y for v in x.values() for y in leaves(v)] if isinstance(x, dict) else [x]


def load_without_torch_pruning(folder):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lightning_unlearn", "torch_pruning")]:
        del sys.modules[name]
    sys.modules["torch_pruning"] = None
    load = importlib.import_module("lightning_unlearn.shrinking").load_shrunk
    content = torch.load("small.pt", weights_only=True)
    assert {type(x) for x in leaves(content)} <= {torch.Tensor, int, str, tuple}, leaves(content)
    net = load(convnet(), "small.pt").eval()
    with torch.no_grad():
        torch.save(net(torch.load("x.pt")), folder / "y.pt")


def test_loaded_in_a_process_without_torch_pruning(tmp_path):
    small = shrunk_convnet()
    save_shrunk(small, tmp_path / "small.pt")
    torch.save(IMAGES, tmp_path / "x.pt")
    done = forked.call(load_without_torch_pruning, tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), outputs(small, IMAGES))


def test_a_module_of_lightning_saved_and_loaded(tmp_path):
    module = Toy()
    silence(module.net[0], module.net[1])
    small = shrink(module, X)
    save_shrunk(small, tmp_path / "small.pt")
    loaded = load_shrunk(Toy(), tmp_path / "small.pt")
    assert isinstance(loaded, L.LightningModule)
    assert torch.equal(outputs(loaded, X), outputs(small, X))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: convnet()[:8], "the model has no '8.weight'"),
        (lambda: nn.Sequential(*convnet(), nn.Linear(4, 4)), "'9.weight' is missing in the file"),
        (perceptron, "the model has no"),
        (lambda: nn.Sequential(nn.Conv2d(2, 6, 3), *convnet()[1:]), r"has shape \(10, 2, 3, 3\)"),
        (lambda: nn.Sequential(nn.Conv1d(2, 12, 3), *convnet()[1:]), r"full model has \(12, 2, 3\)"),
    ],
)
def test_a_file_of_another_model(tmp_path, make, match):
    save_shrunk(shrunk_convnet(), tmp_path / "small.pt")
    net = make()
    before = weights(net)
    with pytest.raises(ValueError, match=match):
        load_shrunk(net, tmp_path / "small.pt")
    assert_same_weights(before, weights(net))


def test_another_file(tmp_path):
    torch.save(convnet().state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="Expected a file that save_shrunk wrote"):
        load_shrunk(convnet(), tmp_path / "other.pt")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


def shrunk_file(**changes):
    return {"format": FORMAT, "state": shrunk_convnet().state_dict(), "sizes": {"0": {"out_channels": 12}}} | changes


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: shrunk_file(state=Evil()), "cannot be read as one; check the path, or save it again"),
        (lambda: shrunk_file(state={"0.weight": 3}), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(state=None), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes=None), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes={"0": {"forward": 1}}), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes={"0": {"__class__": 1}}), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes={"0": {"out_channels": "1"}}), "to hold tensors and sizes of layers only"),
        (lambda: shrunk_file(sizes={"0": 3}), "to hold tensors and sizes of layers only"),
    ],
)
def test_a_file_that_would_do_more_is_refused(tmp_path, monkeypatch, make, match):
    monkeypatch.chdir(tmp_path)
    torch.save(make(), "bad.pt")
    net = convnet()
    before = weights(net)
    with pytest.raises(ValueError, match=match):
        load_shrunk(net, "bad.pt")
    assert not Path("ran").exists()
    assert_same_weights(before, weights(net))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", pickle.dumps(Evil())])
def test_a_broken_file_is_refused(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as one"):
        load_shrunk(convnet(), tmp_path / "bad.pt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a file to write, but .* is a folder"):
        save_shrunk(convnet(), tmp_path)
    with pytest.raises(ValueError, match=r"Expected a file to read, but .* is a folder"):
        load_shrunk(convnet(), tmp_path)


def test_a_state_that_is_no_tensor(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"odd": object()}

    with pytest.raises(ValueError, match="Expected a state of tensors, but '_extra_state' is a dict"):
        save_shrunk(Odd(2, 2), tmp_path / "odd.pt")
