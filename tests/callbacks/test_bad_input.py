import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, SensitivityPruneCallback
from lightning_unlearn.pruning.criteria import Sensitivity
from tests.toys import Blobs, BlobsData, Residual, Swapped, Toy, fit, mlp, partition_callback, trio


def refused(error, match, callbacks, *, module=None, data=None, steps=0, **trainer):
    """Fits, expects the error, and that it comes before the first training step."""
    module = module or Toy()
    with pytest.raises(error, match=match):
        fit(module, BlobsData(Blobs(101)) if data is None else data, callbacks, **trainer)
    assert module.steps == steps


# Arguments: refused when the callback is made.


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AttributionPartitionCallback(at_epoch=0), "at_epoch to be 'auto', .* but got 0"),
        (
            lambda: AttributionPartitionCallback(at_epoch=2, suspect_precision=1),
            r"precision to lie in \[0.5, 1\), but got 1",
        ),
        (
            lambda: AttributionPartitionCallback(at_epoch=2, suspect_precision=0.4),
            r"precision to lie in \[0.5, 1\), but got 0.4",
        ),
        (
            lambda: AttributionPartitionCallback(at_epoch=2, recipe="lable"),
            "recipe to be one of .*'label'.*'rlap'.* but got 'lable'. Did you mean 'label'",
        ),
        (
            lambda: partition_callback(at_epoch=2, evidence_from="x"),
            "evidence_from to be 'train_steps' or 'eval_passes', but got 'x'",
        ),
        (
            lambda: partition_callback(at_epoch=2, min_class_fraction=1.0),
            r"min_class_fraction to lie in \[0, 1\), but got 1.0",
        ),
        (
            lambda: partition_callback(at_epoch=2, min_class_fraction=-0.1),
            r"min_class_fraction to lie in \[0, 1\), but got -0.1",
        ),
        (lambda: partition_callback(at_epoch=2, attribution_method="deplift"), "'deplift'"),
        (
            lambda: AttributionPartitionCallback(at_epoch=2, recipe="tests.toys.nothing"),
            "can be imported, but 'tests.toys.nothing' cannot: .*has no attribute 'nothing'",
        ),
        (
            lambda: AttributionPartitionCallback(at_epoch=2, recipe="no_such_package.recipe"),
            "can be imported, but 'no_such_package.recipe' cannot: No module named 'no_such_package'",
        ),
        (
            lambda: AttributionPartitionCallback(at_epoch=2, recipe="tests.toys.CLASSES"),
            "recipe 'tests.toys.CLASSES' to be a function, but it is a int",
        ),
        (lambda: SensitivityPruneCallback(amount=0), r"amount to lie in \(0, 1\), .* but got 0"),
        (lambda: SensitivityPruneCallback(amount=1.0), r"amount to lie in \(0, 1\), .* but got 1.0"),
        (lambda: SensitivityPruneCallback(amount=-0.1), r"amount to lie in \(0, 1\), .* but got -0.1"),
        (lambda: Sensitivity(l2_penalty=-1.0), "l2_penalty to be at least 0, but got -1.0"),
        (lambda: CleanSubsetFinetuneCallback("some"), "mode to be 'full' or 'layers', but got 'some'"),
        (lambda: CleanSubsetFinetuneCallback(layers=["net.7"]), r"layers only with mode='layers', but got mode='full'"),
        (lambda: CleanSubsetFinetuneCallback("layers", layers=[]), "name at least one module, but got an empty list"),
        (lambda: CleanSubsetFinetuneCallback(lr=0.0), "lr to be greater than 0, but got 0.0"),
        (
            lambda: CleanSubsetFinetuneCallback(lr_scheduler=lambda _: None),
            "lr_scheduler needs lr or optimizer: it schedules a fresh optimizer",
        ),
    ],
)
def test_arguments_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# The model.


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [AttributionPartitionCallback("net.77", at_epoch=2)],
        lambda: [partition_callback(at_epoch=2, input_layer="net.77")],
        lambda: [AttributionPartitionCallback(at_epoch=2), SensitivityPruneCallback("net.77")],
        lambda: [
            AttributionPartitionCallback(at_epoch=2),
            CleanSubsetFinetuneCallback("layers", layers=["net.7", "net.77"]),
        ],
    ],
    ids=["partition", "input_layer", "prune", "finetune"],
)
def test_an_unknown_layer_lists_the_near_names(callbacks):
    refused(
        ValueError, r"dotted path of a module of Toy, but got 'net.77'. The nearest names are: .*net\.7", callbacks()
    )


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [AttributionPartitionCallback("net.unused", at_epoch=2)],
        lambda: [partition_callback(at_epoch=2, input_layer="net.unused")],
        lambda: [
            AttributionPartitionCallback(at_epoch=2),
            SensitivityPruneCallback("net.unused", amount=0.4),
        ],
    ],
    ids=["partition", "input_layer", "prune"],
)
def test_a_layer_that_is_never_reached(callbacks):
    refused(
        ValueError,
        "'net.unused' exists but is never reached in forward.* reached: .*net.(body|head)",
        callbacks(),
        module=Toy(Swapped),
    )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.same, self.head = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.same(self.same(self.body(x)).relu()))


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [AttributionPartitionCallback("net.same", at_epoch=2)],
        lambda: [AttributionPartitionCallback(at_epoch=2), SensitivityPruneCallback("net.same")],
    ],
)
def test_a_layer_that_is_called_twice(callbacks):
    refused(ValueError, "'net.same' is called 2 times in one forward pass", callbacks(), module=Toy(Twice))


def test_a_model_without_linear_needs_a_name():
    def net():
        return nn.Sequential(nn.Conv2d(2, 4, 8), nn.Flatten())

    refused(
        ValueError,
        r"with 4 outputs, one for each class, but forward calls none; name the layer with layer=",
        [AttributionPartitionCallback(at_epoch=2)],
        module=Toy(net),
        data=BlobsData(Blobs(101, image=True)),
    )


@pytest.mark.parametrize(
    ("layer", "amount", "match"),
    [
        ("net.1", 0.15, "cannot prune layer 'net.1'. Expected a Linear or a convolution, but got a BatchNorm1d"),
        ("net.4", 0.01, "cannot prune layer 'net.4'. amount=0.01 of 20 neurons rounds to zero; use at least"),
        (None, 0.01, "amount=0.01 of 20 neurons rounds to zero"),
    ],
)
def test_what_cannot_be_pruned(layer, amount, match):
    partition, prune, _ = trio(2, prune={"layer": layer, "amount": amount})
    refused(ValueError, match, [partition, prune])


def test_a_module_without_parameters_cannot_be_trained():
    partition, _, finetune = trio(2, finetune={"mode": "layers", "layers": ["net.2"]})
    refused(ValueError, "modules with parameters, but 'net.2' has none", [partition, finetune])


class ThreeDimensions(Toy):
    def forward(self, x):
        return self.net(x).unsqueeze(2)


class NoTensor(Toy):
    def forward(self, x):
        return {"scores": self.net(x)}


@pytest.mark.parametrize(
    ("module", "found"),
    [(ThreeDimensions, r"torch.float32 \(16, 4, 1\)"), (NoTensor, "dict")],
    ids=["three dimensions", "a dict"],
)
def test_a_forward_that_returns_no_logits(module, found):
    refused(
        TypeError,
        rf"forward of {module.__name__} to return logits \(B, C\), or .* returned {found}; pass data=.*logits_from=",
        [AttributionPartitionCallback(at_epoch=2)],
        module=module(),
        limit_val_batches=0,
    )


# The data.


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Blobs(20))


class Endless(Dataset):
    def __getitem__(self, index):
        return Blobs(20)[index]


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), TypeError, "Stream is an IterableDataset, whose samples have no"),
        (lambda: DataLoader(Endless(), batch_size=4, sampler=range(20)), TypeError, "Endless has no __len__; add one"),
        (lambda: DataLoader(Blobs(9), batch_size=4), ValueError, "at least 10 training samples .* the dataset has 9"),
        (lambda: DataLoader(Blobs(20), batch_size=None), ValueError, "has batch_size=None; set a batch_size"),
        (lambda: [DataLoader(Blobs(20)), DataLoader(Blobs(20))], TypeError, "one .*DataLoader .* but got list"),
        (lambda: {"a": DataLoader(Blobs(20))}, TypeError, "one .*DataLoader .* but got dict; give the loader with the"),
    ],
    ids=["iterable", "no length", "too few", "no batches", "several loaders", "a dict of loaders"],
)
def test_data_whose_samples_cannot_be_told_apart(data, error, match):
    refused(error, match, [AttributionPartitionCallback(at_epoch=2)], data=data())


def collated(change):
    def collate(rows):
        return change(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))

    return DataLoader(Blobs(40), batch_size=8, collate_fn=collate)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            lambda x, y: {"x": x, "cls": y},
            TypeError,
            "labels under one of .* but it has 'x', 'cls'; pass data=",
        ),
        (
            lambda x, y: (x[:, :3], y),
            TypeError,
            r"Toy to take .* but forward\(batch\[0\]\), with batch\[1\] as labels, raised RuntimeError: mat1"
            r" .* pass data=DataFormat\(batch_to_xy=lambda batch: \(batch\[0\], batch\[1\]\)\) to",
        ),
        (lambda x, y: {"x": x, "z": x, "y": [0] * len(y)}, TypeError, "but it has 'x', 'z', 'y'; pass data=DataFormat"),
        (lambda x, y: x, TypeError, "but got a Tensor of 8; pass data=DataFormat"),
        (lambda x, y: (x, y.float()), ValueError, r"integer labels of shape \(8,\).* torch.float32 of shape \(8,\)"),
        (lambda x, y: (x, y.reshape(2, 4)), ValueError, r"integer labels of shape \(8,\).* of shape \(2, 4\)"),
        (
            lambda x, y: (x, y + 1),
            ValueError,
            r"labels in \[0, 4\), .* but found 4 in the batch that starts at dataset",
        ),
        (lambda x, y: (x, y - 1), ValueError, r"labels in \[0, 4\), .* but found -1 in the batch"),
    ],
    ids=[
        "dict",
        "other shape",
        "list",
        "no labels",
        "float labels",
        "label matrix",
        "label too large",
        "negative label",
    ],
)
def test_batches_that_are_not_inputs_and_labels(change, error, match):
    refused(error, match, [AttributionPartitionCallback(at_epoch=2)], data=collated(change))


@pytest.mark.parametrize(("evidence", "steps"), [("eval_passes", 3), ("train_steps", 6)])
def test_a_wrong_label_further_in_is_found_by_the_first_pass_with_its_place(evidence, steps):
    data = Blobs(40)
    data.y[25] = 7
    # The loss never sees it, so that nothing but the pass can find it.
    module = Toy()
    loader = DataLoader(data, batch_size=8, sampler=SubsetRandomSampler(range(24)))
    refused(
        ValueError,
        "but found 7 in the batch that starts at dataset index 24",
        [partition_callback(at_epoch=2, evidence_from=evidence)],
        module=module,
        data=loader,
        steps=steps,
    )


def test_labels_that_are_all_equal():
    data = Blobs(40)
    data.y[:] = 2
    # Known when every label has been seen, in the last pass.
    refused(
        ValueError,
        "at least two classes, but all 40 samples have label 2",
        [AttributionPartitionCallback(at_epoch=2)],
        data=BlobsData(data),
        steps=6,
    )


class Opaque(BatchSampler):
    """No ``sampler`` to narrow."""

    def __init__(self):
        pass

    def __iter__(self):
        return iter([list(range(i, i + 10)) for i in range(0, 40, 10)])

    def __len__(self):
        return 4


class EasyFirst(WeightedRandomSampler):
    """A curriculum."""

    def __iter__(self):
        return iter(self.weights.argsort().tolist())


class NoSize(Opaque):
    """A sampler to narrow, but no size to count its batches with."""

    def __init__(self):
        self.sampler = torch.utils.data.SequentialSampler(range(40))


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (
            lambda data: {"sampler": EasyFirst(torch.rand(40), 40)},
            "draws with EasyFirst, which narrowing to the clean subset would silently replace",
        ),
        (lambda data: {"batch_sampler": Opaque()}, "draws with Opaque without .sampler"),
        (
            lambda data: {"batch_sampler": NoSize()},
            "batch_size and .drop_last, as torch's BatchSampler has, but NoSize",
        ),
    ],
    ids=["sampler of one's own", "opaque", "without size"],
)
def test_a_sampler_that_a_subset_would_replace(loader, found):
    data = Blobs(40)
    sampler = loader(data)
    kwargs = sampler if "batch_sampler" in sampler else {"batch_size": 8, **sampler}
    partition, _, finetune = trio(2)
    refused(
        TypeError,
        found,
        [partition, finetune],
        data=DataLoader(data, **kwargs),
    )
    # To find the wrong labels alone, any sampler will do.
    partition, _, _ = trio(1)
    fit(Toy(), DataLoader(data, **kwargs), [partition], max_epochs=2)
    assert len(partition.partition) == 40


# The Trainer.


@pytest.mark.parametrize("max_epochs", [2, 3])
def test_no_epoch_left_after_the_partition(max_epochs):
    refused(
        MisconfigurationException,
        f"at_epoch to be less than .* max_epochs.* but got at_epoch=3 and max_epochs={max_epochs}",
        trio(3),
        max_epochs=max_epochs,
    )


@pytest.mark.parametrize("kwargs", [{"max_epochs": -1, "max_steps": 30}, {"max_epochs": None, "max_steps": 30}])
def test_no_limit_on_the_epochs_is_fine(kwargs):
    callbacks = trio(2, finetune={"lr": 0.01})
    fit(Toy(), BlobsData(Blobs(101)), callbacks, **kwargs)
    assert callbacks[2].is_active


@pytest.mark.parametrize("who", range(3))
def test_overfit_batches(who):
    callbacks = trio(2)
    name = type(callbacks[who]).__name__
    refused(
        MisconfigurationException,
        f"{name} needs all the training data, but the Trainer has overfit_batches=0.5",
        [callbacks[who]],
        overfit_batches=0.5,
    )


def test_a_fresh_optimizer_in_place_of_several():
    class Two(Toy):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.05) for i in (0, 7)]

    partition, _, finetune = trio(2, finetune={"lr": 0.01})
    refused(
        MisconfigurationException,
        "replace a single optimizer, but the module has 2. Leave out lr, optimizer and lr_scheduler",
        [partition, finetune],
        module=Two(manual=True),
    )


def test_two_of_a_kind_are_lightnings_error():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AttributionPartitionCallback`"):
        L.Trainer(callbacks=[AttributionPartitionCallback(at_epoch=n) for n in (1, 2)], logger=False, accelerator="cpu")


@pytest.mark.parametrize("net", [mlp, Residual])
def test_diverged_training_is_an_error_that_says_so(net):
    class Diverged(Toy):
        def on_train_epoch_end(self):
            with torch.no_grad():
                next(self.parameters()).fill_(torch.nan)

    with pytest.raises(
        ValueError, match=r"samples are NaN or infinite, and so is the model's .*: training has diverged"
    ):
        fit(Diverged(net), BlobsData(Blobs(101)), [AttributionPartitionCallback(at_epoch=2)], max_epochs=3)
