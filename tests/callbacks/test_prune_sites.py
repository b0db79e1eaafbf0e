import pytest
import torch
from torch import nn

from lightning_unlearn import SensitivityPruneCallback
from tests.callbacks.published import Published, make_partition
from tests.toys import CLASSES, FEATURES, Blobs, BlobsData, Residual, Toy, fit, weights

ANY = {"criterion": "random", "max_val_drop": None}


class Net(nn.Module):
    """Parts, and a forward of the test's own over them."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def prune(net, layer, *, image=False, amount=0.3, epochs=3, size=64, **arguments):
    """A fit with pruning after the first epoch; the module, the callback."""
    data = Blobs(size, image=image)
    probability = torch.rand(size, generator=torch.Generator().manual_seed(1))
    callback = SensitivityPruneCallback(layer, amount=amount, **{**ANY, **arguments})
    module = Toy(net, adam)
    fit(module, BlobsData(data), [callback, Published(make_partition(probability, data.y))], max_epochs=epochs)
    return module.eval(), callback


def adam(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


def seen(module, layer, x):
    """What a layer returns."""
    found = []
    handle = module.get_submodule(layer).register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        module(x)
    handle.remove()
    return found[0]


IMAGES = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(0))


def conv(norm, inner="relu", kernel=nn.Conv2d):
    """conv - norm - relu, or conv - relu - norm."""

    def run(self, x):
        if self.inner == "relu first":
            return self.head(self.norm(self.conv(x).relu()).mean(dim=(2, 3)))
        return self.head(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))

    def make():
        net = Net(run, conv=kernel(2, 12, 3), norm=norm(), head=nn.Linear(12, CLASSES))
        net.inner = inner
        return net

    return make


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(12),
        lambda: nn.GroupNorm(3, 12),
        lambda: nn.InstanceNorm2d(12, affine=True),
        lambda: nn.LayerNorm([12, 6, 6]),
    ],
    ids=["batch", "group", "instance", "layer"],
)
@pytest.mark.parametrize("order", ["norm first", "relu first"])
def test_a_channel_is_silent_behind_its_norm(norm, order):
    module, callback = prune(conv(norm, order), "net.conv", image=True)
    out = seen(module, "net.norm", IMAGES)
    silent = (out == 0).all(dim=0).all(dim=-1).all(dim=-1)
    assert len(callback.mask.pruned_indices()) == 3
    assert silent.equal(~callback.mask.keep)


def mlp(norm, inner="norm first"):
    def run(self, x):
        if inner == "relu first":
            return self.head(self.norm(self.fc(x).relu()))
        return self.head(self.norm(self.fc(x)).relu())

    return lambda: Net(run, fc=nn.Linear(FEATURES, 20), norm=norm(), head=nn.Linear(20, CLASSES))


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.LayerNorm(20), lambda: nn.BatchNorm1d(20), lambda: nn.GroupNorm(4, 20), lambda: nn.RMSNorm(20)],
    ids=["layer", "batch", "group", "rms"],
)
@pytest.mark.parametrize("order", ["norm first", "relu first"])
def test_a_neuron_is_silent_behind_its_norm(norm, order):
    module, callback = prune(mlp(norm, order), "net.fc")
    assert (seen(module, "net.norm", ROWS) == 0).all(dim=0).equal(~callback.mask.keep)
    assert len(callback.mask.pruned_indices()) == 6


def test_a_one_dimensional_convolution():
    def run(self, x):
        return self.head(self.conv(x.flatten(2)).relu().mean(dim=2))

    module, callback = prune(
        lambda: Net(run, conv=nn.Conv1d(2, 10, 3), head=nn.Linear(10, CLASSES)), "net.conv", image=True
    )
    out = seen(module, "net.conv", IMAGES)
    assert out.shape == (6, 10, 62)
    assert (out == 0).all(dim=2).all(dim=0).equal(~callback.mask.keep)


@pytest.mark.parametrize("groups", [1, 12])
def test_convolutions_in_groups_and_a_linear_in_a_sequence(groups):
    def run(self, x):
        h = self.stem(x).relu()
        h = self.conv(h).relu().flatten(2).movedim(1, 2)
        return self.head(self.fc(h).relu().mean(dim=1))

    def make():
        return Net(
            run,
            stem=nn.Conv2d(2, 12, 3),
            conv=nn.Conv2d(12, 12, 3, groups=groups),
            fc=nn.Linear(12, 10),
            head=nn.Linear(10, CLASSES),
        )

    module, callback = prune(make, ["net.conv", "net.fc"], image=True)
    by_channel, by_neuron = callback.masks
    assert (seen(module, "net.conv", IMAGES) == 0).all(dim=0).all(-1).all(-1).equal(~by_channel.keep)
    assert (seen(module, "net.fc", IMAGES) == 0).flatten(0, 1).all(dim=0).equal(~by_neuron.keep)


class Resnet(nn.Module):
    def __init__(self):
        super().__init__()
        torchvision = pytest.importorskip("torchvision")
        self.net = torchvision.models.resnet18(num_classes=CLASSES)
        self.net.conv1 = nn.Conv2d(2, 64, 3, padding=1)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(("layer", "norm"), [("layer1.0.conv1", "layer1.0.bn1"), ("layer1.0.conv2", "layer1.0.bn2")])
def test_a_convolution_inside_a_residual_block_of_a_resnet(layer, norm):
    module, callback = prune(Resnet, f"net.net.{layer}", image=True, amount=0.1, epochs=2, size=32)
    out = seen(module, f"net.net.{norm}", IMAGES)
    # In place, bn2's output has the identity added and bn1's is rectified: look at the parameters that make it 0.
    gone = callback.mask.pruned_indices()
    assert len(gone) == 6
    parts = [module.get_submodule(f"net.net.{name}") for name in (layer, norm)]
    assert all((p[gone] == 0).all() for part in parts for p in part.parameters())
    if layer.endswith("conv1"):
        assert (out[:, gone] == 0).all()
    assert (parts[0].weight[callback.mask.keep] != 0).any()


@pytest.mark.parametrize("first", [True, False], ids=["pre-norm", "post-norm"])
def test_a_linear_in_a_transformer_block(first):
    def run(self, x):
        return self.head(self.block(self.embed(x.unflatten(1, (4, 4)))).mean(dim=1))

    def make():
        block = nn.TransformerEncoderLayer(8, 2, 20, dropout=0.0, batch_first=True, norm_first=first)
        return Net(run, embed=nn.Linear(4, 8), block=block, head=nn.Linear(8, CLASSES))

    module, callback = prune(make, ["net.block.linear1", "net.block.linear2"])
    hidden, contribution = callback.masks
    assert (seen(module, "net.block.linear1", ROWS) == 0).flatten(0, 1).all(dim=0).equal(~hidden.keep)
    # Of the branch's last layer, the contribution to the stream is silent; the stream and its norms go on.
    assert (seen(module, "net.block.linear2", ROWS) == 0).flatten(0, 1).all(dim=0).equal(~contribution.keep)
    assert (module.net.block.norm1.weight != 0).all()
    assert (module.net.block.norm2.weight != 0).all()


def test_a_projection_of_attention_is_silent_by_its_rows():
    def run(self, x):
        h = x.unflatten(1, (4, 4))
        q, k, v = (part(h) for part in (self.q, self.k, self.v))
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(dim=1))

    def make():
        return Net(run, **{n: nn.Linear(4, 10) for n in "qkv"}, head=nn.Linear(10, CLASSES))

    module, callback = prune(make, ["net.q", "net.v"])
    assert (seen(module, "net.v", ROWS) == 0).flatten(0, 1).all(dim=0).equal(~callback.masks[1].keep)
    # What attention makes of a silent value is silent, so the head does not hear it either.
    head = module.net.head
    found = []
    handle = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        module(ROWS)
    handle.remove()
    assert (found[0] == 0).all(dim=0).equal(~callback.masks[1].keep)


# Refused by name


def blocked(run, **parts):
    return lambda: Net(run, **{"head": nn.Linear(20, CLASSES), **parts})


def in_place(self, x):
    h = self.stem(x)
    branch = self.fc(h.relu())
    branch += h
    return self.head(self.norm(branch).relu())


def out_of_place(self, x):
    h = self.stem(x)
    return self.head(self.norm(h + self.fc(h.relu())).relu())


def residual(run):
    return blocked(run, stem=nn.Linear(FEATURES, 20), fc=nn.Linear(20, 20), norm=nn.BatchNorm1d(20))


def tied():
    net = Net(
        lambda self, x: self.head(self.two(self.one(x).relu()).relu()),
        one=nn.Linear(FEATURES, FEATURES),
        two=nn.Linear(FEATURES, FEATURES),
        head=nn.Linear(FEATURES, CLASSES),
    )
    net.two.weight = net.one.weight
    return net


def tied_head():
    net = tied()
    net.two = nn.Linear(FEATURES, CLASSES)
    net.two.weight = net.head.weight
    net.run = lambda self, x: (self.two(x), self.head(self.one(x).relu()))[1]
    return net


def in_a_block():
    block = Net(lambda self, x: self.b(self.a(x).relu()), a=nn.Linear(FEATURES, 20), b=nn.Linear(20, 20))
    return Net(lambda self, x: self.head(self.block(x)), block=block, head=nn.Linear(20, CLASSES))


def attention():
    return Net(
        lambda self, x: self.head(self.mha(*[x.unflatten(1, (2, 8))] * 3)[0].mean(dim=1)),
        mha=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, CLASSES),
    )


def flattened():
    return Net(
        lambda self, x: self.head(self.fc(x.view(-1, 4)).view(len(x), -1)),
        fc=nn.Linear(4, 20),
        head=nn.Linear(80, CLASSES),
    )


def shared_norm():
    return Net(
        lambda self, x: self.head(self.norm(self.b(self.norm(self.a(x)).relu())).relu()),
        a=nn.Linear(FEATURES, 20),
        b=nn.Linear(20, 20),
        norm=nn.LayerNorm(20),
        head=nn.Linear(20, CLASSES),
    )


REFUSED = {
    "a sum in place": (
        residual(in_place),
        "net.fc",
        "cannot prune layer 'net.fc'. Something is added to its output in place .* name the layer before it, 'net.st",
    ),
    "a block": (
        in_a_block,
        "net.block",
        "cannot prune layer 'net.block'. Expected a Linear or a convolution, but got a Net. Name one inside it:"
        " 'net.block.a', 'net.block.b'.",
    ),
    "a norm": (residual(out_of_place), "net.norm", "got a BatchNorm1d. Name the Linear or convolution that feeds it."),
    "tied weights": (tied, "net.one", "cannot prune layer 'net.one'. Its parameters are shared with 'net.two'"),
    "a tied head": (tied_head, None, "cannot prune layer 'net.head'. Its parameters are shared with 'net.two'"),
    "fused attention": (attention, "net.mha.out_proj", "Layer 'net.mha.out_proj' exists but is never reached"),
    "rows that are no samples": (flattened, "net.fc", "has no row for each of the 16 samples of a batch"),
    "a norm that is called twice": (shared_norm, "net.a", "'net.norm' is called 2 times in one forward pass"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_name_before_the_first_step(case):
    net, layer, match = REFUSED[case]
    data = Blobs(64)
    module = Toy(net)
    published = Published(make_partition(torch.rand(64), data.y))
    before = weights(module)
    with pytest.raises(ValueError, match=match):
        fit(module, BlobsData(data), [SensitivityPruneCallback(layer, amount=0.3), published], max_epochs=3)
    assert module.steps == 0
    assert all(value.equal(before[name]) for name, value in weights(module).items())


def test_a_branch_whose_sum_is_not_in_place_is_pruned_as_a_contribution():
    module, callback = prune(residual(out_of_place), "net.fc")
    assert (seen(module, "net.fc", ROWS) == 0).all(dim=0).equal(~callback.mask.keep)
    assert (module.net.norm.weight != 0).all()  # the norm belongs to the stream
    module, callback = prune(residual(in_place), "net.stem")
    assert len(callback.mask.pruned_indices()) == 6


def test_an_activation_in_place_is_no_sum():
    def run(self, x):
        return self.head(nn.functional.relu_(self.fc(x)))

    module, callback = prune(blocked(run, fc=nn.Linear(FEATURES, 20)), "net.fc")
    assert (seen(module, "net.fc", ROWS) == 0).all(dim=0)[callback.mask.pruned_indices()].all()


def test_one_module_under_two_names_is_not_tied():
    def make():
        net = blocked(lambda self, x: self.head(self.fc(x).relu()), fc=nn.Linear(FEATURES, 20))()
        net.alias = net.fc
        return net

    module, callback = prune(make, "net.fc")
    assert (module.net.fc.weight[callback.mask.pruned_indices()] == 0).all()


def test_by_default_a_feeder_that_is_tied_is_left_alone():
    module, callback = prune(tied, None)
    assert callback.mask.layer == callback.target_layer() == "net.head"
    gone = callback.mask.pruned_indices()
    assert (module.net.head.weight[:, gone] == 0).all()
    assert (module.net.two.weight[gone] != 0).any()


def test_where_a_residual_feeds_the_head_the_target_is_known_from_the_start():
    data = Blobs(64)
    callback = SensitivityPruneCallback()
    late = Published(make_partition(torch.rand(64), data.y, epoch=99))
    fit(Toy(Residual), BlobsData(data), [callback, late], max_epochs=1)
    assert callback.target_layer() == "net.head"
    assert not callback.has_result
