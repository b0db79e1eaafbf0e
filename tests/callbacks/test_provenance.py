"""A checkpoint, and a file, say where a result comes from and what was done to which samples and neurons."""

import inspect
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

import lightning_unlearn
from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    DataFormat,
    SensitivityPruneCallback,
)
from lightning_unlearn.data.batch import split_batch
from lightning_unlearn.results.provenance import to_jsonable
from tests.toys import CLASSES, Blobs, BlobsData, Toy, fit, trio

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{line}:UserWarning")
    for line in ("You defined a `validation_step`", "Be aware that when using `ckpt_path`", "You.re resuming")
]
SIZE, AT, EPOCHS = 101, 1, 3
NAME = "AttributionPartitionCallback"


def callbacks(folder, **kwargs):
    review = folder / "suspects.csv"
    review.write_text("index,suggested_label,decision\n3,,keep\n5,,drop\n")
    return trio(
        AT,
        review=review,
        recipe="aum",
        prune={"criterion": "magnitude", "amount": 0.3, "max_val_drop": None},
        finetune={"on_noisy": "relabel"},
        **kwargs,
    )


def run(folder, **kwargs):
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    ours = callbacks(folder)
    fit(Toy(), BlobsData(Blobs(SIZE), by_epoch=True), [*ours, keep], enable_checkpointing=True, **kwargs)
    return ours


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a fit, and its callbacks."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, max_epochs=EPOCHS)


def state(folder, epoch):
    return torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True)["callbacks"][NAME]


def test_it_says_which_samples_and_neurons(whole):
    _, (partition, prune, finetune) = whole
    found = partition.provenance
    drawn, draw = partition.partition, finetune.training_subset
    assert found["data"] == {"samples": SIZE, "fingerprint": drawn.fingerprint}
    assert found["partition"]["suspects"] == (~drawn.is_clean).nonzero().flatten().tolist()
    assert found["partition"]["recipe"] == "aum"
    assert [one["epoch"] for one in found["partition"]["rounds"]] == [AT]
    done = found["done"]["CleanSubsetFinetuneCallback"]
    assert sorted([*done["dropped"], *draw.index.tolist()]) == list(range(SIZE))
    assert 5 in done["dropped"]
    assert done["from_epoch"] == AT
    assert len(done["relabeled"]) == len(draw.relabeled) > 0
    for one in done["relabeled"]:
        assert one["given"] == drawn.label[one["index"]] != one["new"] == draw.new_label[one["index"]]
    pruned = found["done"]["SensitivityPruneCallback"]["pruned"]
    assert pruned == {prune.mask.layer: prune.mask.pruned_indices().tolist()}
    assert len(pruned[prune.mask.layer]) > 0
    assert found["review"]["keep"] == [3]
    assert found["review"]["drop"] == [5]
    assert found["review"]["relabel"] == []
    assert found["review"]["stale"] == 0
    assert found["review"]["path"].endswith("suspects.csv")
    assert found["accuracy"]["before"] == partition.summary.accuracy_before


def test_it_says_with_which_versions_seed_and_settings(whole):
    _, (partition, _, _) = whole
    (fit_of_it,) = partition.provenance["fits"]
    assert fit_of_it["seed"] == 0
    assert fit_of_it["ranks"] == 1
    assert fit_of_it["from_epoch"] == 0
    versions = fit_of_it["versions"]
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["lightning"] == L.__version__
    assert versions["lightning-unlearn"] == lightning_unlearn.__version__
    assert {"python", "captum"} <= versions.keys()
    settings = fit_of_it["settings"]
    assert settings[NAME]["at_epoch"] == AT
    assert settings[NAME]["recipe"] == "aum"
    assert settings[NAME]["review"].endswith("suspects.csv")
    assert settings["SensitivityPruneCallback"]["criterion"] == "magnitude"
    assert settings["SensitivityPruneCallback"]["amount"] == 0.3
    assert settings["CleanSubsetFinetuneCallback"]["on_noisy"] == "relabel"


def test_a_checkpoint_has_it_and_who_reads_only_that_too(whole, tmp_path):
    folder, (partition, _, _) = whole
    assert state(folder, 0)["provenance"] is None
    recorded = state(folder, EPOCHS - 1)["provenance"]
    # What the end of the fit adds: the validation that follows.
    assert recorded["accuracy"]["after"] is None
    assert recorded | {"accuracy": partition.provenance["accuracy"]} == partition.provenance
    reader = AttributionPartitionCallback(at_epoch=AT)
    reader.load_state_dict(state(folder, EPOCHS - 1))
    assert reader.provenance == recorded
    reader.save_provenance(tmp_path / "deep" / "provenance.json")
    assert json.loads((tmp_path / "deep" / "provenance.json").read_text()) == recorded


def test_a_resumed_fit_adds_what_it_was_made_with(whole, tmp_path):
    folder, (partition, _, _) = whole
    again, _, _ = run(tmp_path, max_epochs=EPOCHS, ckpt_path=folder / f"epoch={AT}.ckpt")
    found, before = again.provenance, partition.provenance
    assert [one["from_epoch"] for one in found["fits"]] == [0, AT + 1]
    assert found["fits"][0] == before["fits"][0]
    for name in ("data", "partition", "done"):
        assert found[name] == before[name], name
    assert found["review"]["drop"] == [5]


def test_before_the_partition_there_is_none():
    with pytest.raises(RuntimeError, match="No partition yet"):
        _ = AttributionPartitionCallback(at_epoch=3).provenance


def test_a_dry_run_says_that_nothing_was_done(tmp_path):
    partition, prune, finetune = callbacks(tmp_path, dry_run=True)
    fit(Toy(), BlobsData(Blobs(SIZE)), [partition, prune, finetune], max_epochs=2)
    done = partition.provenance["done"]
    assert done["SensitivityPruneCallback"]["pruned"] == {}
    assert done["CleanSubsetFinetuneCallback"] == {
        "from_epoch": None,
        "dropped": [],
        "relabeled": [],
        "weighed": False,
    }


class Several(Toy):
    """Of a task with a label for each of four features."""

    def training_step(self, batch):
        return binary_cross_entropy_with_logits(self(batch[0]), batch[1])


def test_of_several_labels_those_that_were_turned(tmp_path):
    x = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    y = (x[:, :CLASSES] > 0).float()
    y[2] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    (tmp_path / "suspects.csv").write_text("index,suggested_label,decision\n2,1 3,relabel\n7,,drop\n")
    partition = AttributionPartitionCallback(
        at_epoch=1, data=DataFormat(task="multilabel"), review=tmp_path / "suspects.csv"
    )
    finetune = CleanSubsetFinetuneCallback(on_noisy="relabel")
    fit(Several(), DataLoader(TensorDataset(x, y), batch_size=32), [partition, finetune], max_epochs=2)
    done = partition.provenance["done"]["CleanSubsetFinetuneCallback"]
    assert {"index": 2, "given": [1, 0, 0, 0], "new": [0, 1, 0, 1]} in done["relabeled"]
    assert 7 in done["dropped"]
    assert json.loads(json.dumps(partition.provenance)) == partition.provenance


@pytest.mark.parametrize("kind", [AttributionPartitionCallback, SensitivityPruneCallback, CleanSubsetFinetuneCallback])
def test_settings_are_all_arguments(kind):
    needed = {"at_epoch": 7} if kind is AttributionPartitionCallback else {}
    callback = kind(**needed)
    parameters = list(inspect.signature(kind).parameters.values())
    settings = callback.settings()
    of_recipe = ["evidence_from", "attribution_method", "input_layer", "min_class_fraction"]
    beside = of_recipe if kind is AttributionPartitionCallback else []
    assert list(settings) == [*(parameter.name for parameter in parameters), *beside]
    for parameter in parameters:
        default = needed.get(parameter.name, parameter.default)
        if parameter.name == "data":
            assert settings["data"] == vars(DataFormat())
        else:
            assert settings[parameter.name] == default, parameter.name


def test_functions_go_by_their_path(tmp_path):
    settings = AttributionPartitionCallback(
        at_epoch=7, recipe="tests.toys.by_margin", data=DataFormat(batch_to_xy=split_batch)
    ).settings()
    assert settings["recipe"] == "tests.toys.by_margin"
    assert settings["data"]["batch_to_xy"] == "lightning_unlearn.data.batch.split_batch"
    assert to_jsonable([tmp_path, torch.ones(2), object(), {1: (float("inf"), None)}]) == [
        str(tmp_path),
        [1.0, 1.0],
        "builtins.object",
        {"1": ["inf", None]},
    ]
