"""What the callbacks keep in a checkpoint, and that it outlives changes in the list of callbacks."""

import io

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_unlearn import (
    AttributionPartitionCallback,
    CleanSubsetFinetuneCallback,
    SensitivityPruneCallback,
    UnlearnReport,
)
from lightning_unlearn.results.provenance import to_jsonable
from tests.toys import (
    CLASSES,
    Blobs,
    BlobsData,
    IndexRecorder,
    Residual,
    Toy,
    assert_same_weights,
    fit,
    make_trainer,
    mlp,
    weights,
)
from tests.toys import (
    quick_trio as trio,
)

PARTITION, PRUNE, FINETUNE = "AttributionPartitionCallback", "SensitivityPruneCallback", "CleanSubsetFinetuneCallback"
PRUNES = {"criterion": "magnitude", "amount": 0.3, "max_val_drop": 0.5}
AT, EPOCHS = 1, 3


def checkpoints(folder, size=101, callbacks=None, extra=(), net=mlp):
    """One of each epoch."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = trio(AT, prune=PRUNES) if callbacks is None else callbacks
    module = Toy(net)
    data = BlobsData(Blobs(size), by_epoch=True, batch_size=16 if size < 200 else 128)
    fit(module, data, [*callbacks, *extra, keep], max_epochs=EPOCHS, enable_checkpointing=True)
    return callbacks, module


def states(folder, epoch):
    """Loaded as Lightning does, which unpickles nothing."""
    return torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True)["callbacks"]


def saved_bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


SIZE = 2000
BYTES = {
    "partition, gathering": ({}, 0, PARTITION, 16 * (CLASSES - 1) + 40),
    # A quarter of the samples is suspect, and named in the provenance.
    "partition, drawn": ({}, 1, PARTITION, 35 + 10 // 4),
    "partition, drawn in rounds": (
        {"every_n_epochs": 1, "min_change": 0},
        1,
        PARTITION,
        16 * (CLASSES - 1) + 40 + 35 + 10 // 4,
    ),
    "prune": ({}, 1, PRUNE, 0),
    "reweight": ({"finetune": {"on_noisy": "reweight"}}, 1, FINETUNE, 12),
    "relabel": ({"finetune": {"on_noisy": "relabel"}}, 1, FINETUNE, 16),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_per_sample(tmp_path, case):
    settings, epoch, name, stated = BYTES[case]
    checkpoints(tmp_path, SIZE, trio(AT, **settings))
    found = saved_bytes(states(tmp_path, epoch)[name])
    # What the docstrings state, and a fixed 8 kB at most for the file format, names and the like.
    assert found <= stated * SIZE + 8192
    if name != FINETUNE:  # of what is not clean, it may keep nothing
        assert found >= stated * SIZE


def test_bytes_per_clean_sample_and_per_neuron(tmp_path):
    checkpoints(tmp_path)
    found = states(tmp_path, 1)
    clean = int(found[PARTITION]["partition"]["is_clean"].sum())
    assert found[FINETUNE]["training_subset"]["index"].untyped_storage().nbytes() == 8 * clean
    mask = found[PRUNE]["masks"][0]
    kept = [value for value in mask.values() if isinstance(value, torch.Tensor)]
    # The criterion "magnitude" has no standard error: of 9 bytes per neuron, 5.
    assert sum(value.untyped_storage().nbytes() for value in kept) == 5 * len(mask["keep"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    extra = [EarlyStopping("val_loss", patience=50, check_on_train_epoch_end=False), Timer()]
    callbacks, module = checkpoints(folder, extra=extra)
    return folder, callbacks, weights(module)


NEIGHBORS = {
    "none": lambda ours: ours,
    "in another order": lambda ours: ours[::-1],
    "another in between": lambda ours: [ours[1], Timer(), ours[0], ModelCheckpoint(save_top_k=0), ours[2]],
    "another EarlyStopping": lambda ours: [
        EarlyStopping("val_loss", patience=9, check_on_train_epoch_end=False),
        *ours,
    ],
    "one without state": lambda ours: [LearningRateMonitor(logging_interval=None), *ours],
}


@pytest.mark.filterwarnings("ignore:You are using LearningRateMonitor|Be aware that when using")
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("neighbors", NEIGHBORS)
def test_it_outlives_other_neighbors(whole, tmp_path, neighbors, epoch):
    folder, callbacks, expected = whole
    ours, module = trio(AT, prune=PRUNES), Toy()
    logger = {} if neighbors != "one without state" else {"logger": True, "default_root_dir": tmp_path}
    fit(
        module,
        BlobsData(Blobs(101), by_epoch=True),
        NEIGHBORS[neighbors](ours),
        ckpt_path=folder / f"epoch={epoch}.ckpt",
        max_epochs=EPOCHS,
        enable_checkpointing=neighbors == "another in between",
        **logger,
    )
    assert ours[0].partition.clean_probability.equal(callbacks[0].partition.clean_probability)
    assert ours[1].mask.keep.equal(callbacks[1].mask.keep)
    assert_same_weights(weights(module), expected)


def resume_without(folder, callbacks, net=mlp, **kwargs):
    module, data = Toy(net), BlobsData(Blobs(101), by_epoch=True)
    record = IndexRecorder(data.train)
    fit(module, data, [*callbacks, record], ckpt_path=folder / "epoch=1.ckpt", max_epochs=EPOCHS, **kwargs)
    return module, record


def test_without_the_pruning_neurons_come_back_and_that_is_said(tmp_path):
    # Of a residual network, where the head alone is pruned, so that a gradient reaches it.
    callbacks, _ = checkpoints(tmp_path, net=Residual, callbacks=trio(AT, prune=PRUNES, recipe="argmax"))
    ours = trio(AT, recipe="argmax")
    with pytest.warns(UserWarning, match=r"SensitivityPruneCallback had acted, .* no longer kept at zero") as caught:
        module, record = resume_without(tmp_path, [ours[2], ours[0]], Residual)
    assert sum("had acted" in str(warning.message) for warning in caught) == 1
    pruned = callbacks[1].mask.pruned_indices()
    assert len(pruned)
    assert (module.net.head.weight[:, pruned] != 0).all()
    assert sorted(record.by_epoch[2]) == ours[0].partition.clean_indices().tolist()


def test_without_the_fine_tuning_all_data_are_trained_on_and_that_is_said(whole):
    folder, callbacks, _ = whole
    ours = trio(AT, prune=PRUNES)
    with pytest.warns(UserWarning, match=r"CleanSubsetFinetuneCallback had acted, .* continues with all data"):
        module, record = resume_without(folder, ours[:2])
    assert sorted(record.by_epoch[2]) == list(range(101))
    assert (module.net[4].weight[callbacks[1].mask.pruned_indices()] == 0).all()


def test_without_the_partition_the_others_are_refused(whole):
    ours = trio(AT, prune=PRUNES)
    with pytest.raises(MisconfigurationException, match="SensitivityPruneCallback needs an Attribution"):
        resume_without(whole[0], ours[1:])


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_without_any_of_them_lightning_trains_on(whole, recwarn):
    module, record = resume_without(whole[0], [])
    assert not any("had acted" in str(warning.message) for warning in recwarn)
    assert sorted(record.by_epoch[2]) == list(range(101))
    assert module.steps == 7


@pytest.mark.parametrize("first", [(), ("partition",)], ids=["to none", "to the partition"])
def test_added_later_they_act_when_the_fit_goes_on(tmp_path, first):
    callbacks = [AttributionPartitionCallback(at_epoch=AT)] if first else []
    checkpoints(tmp_path, callbacks=callbacks)
    ours = trio(AT, prune=PRUNES)
    module, record = resume_without(tmp_path, ours)
    assert ours[0].partition.epoch == (AT if first else 2)
    assert (module.net[4].weight[ours[1].mask.pruned_indices()] == 0).all()
    assert sorted(record.by_epoch[2]) == ours[0].partition.clean_indices().tolist()
    if first:
        assert ours[0].partition.clean_probability.equal(callbacks[0].partition.clean_probability)


@pytest.mark.parametrize("name", [PARTITION, PRUNE, FINETUNE])
def test_a_state_of_another_version_ends_a_fit_and_leaves_validation_alone(whole, tmp_path, name):
    checkpoint = torch.load(whole[0] / "epoch=1.ckpt", weights_only=True)
    del checkpoint["callbacks"][name]["version"]
    path = tmp_path / "old.ckpt"
    torch.save(checkpoint, path)
    data = BlobsData(Blobs(101))
    said = rf"state of {name} in format version \d, but the checkpoint has version None; "
    with pytest.raises(ValueError, match=f"{said}resume with the version of lightning_unlearn that wrote it"):
        fit(Toy(), data, trio(AT), ckpt_path=path, max_epochs=EPOCHS)
    with pytest.warns(UserWarning, match=f"{said}weights are not affected"):
        make_trainer(trio(AT)).validate(Toy(), data, ckpt_path=path, verbose=False)
    # Nor is it stumbled over where the callback is left out.
    make_trainer([]).validate(Toy(), data, ckpt_path=path, verbose=False)


def test_keys_do_not_depend_on_what_a_user_may_tune():
    ones = (AttributionPartitionCallback(at_epoch=1), SensitivityPruneCallback(), CleanSubsetFinetuneCallback())
    others = (
        AttributionPartitionCallback(at_epoch=9, recipe="label"),
        SensitivityPruneCallback(amount=0.3),
        CleanSubsetFinetuneCallback("layers"),
    )
    assert [one.state_key for one in ones] == [other.state_key for other in others] == [PARTITION, PRUNE, FINETUNE]


def changed(state):
    """Changes in place all that a state holds."""
    for part in state.values() if isinstance(state, dict) else state:
        if isinstance(part, torch.Tensor):
            part.zero_()
        elif isinstance(part, (dict, list)):
            changed(part)
    if isinstance(state, list):
        state.append("more")
    else:
        state["more"] = True


@pytest.mark.parametrize("on_noisy", ["drop", "relabel"])
def test_a_state_is_a_copy_on_its_way_out_and_in(tmp_path, on_noisy):
    def fresh():
        return *trio(AT, prune=PRUNES, finetune={"on_noisy": on_noisy}), UnlearnReport(tmp_path, samples=3)

    ours = fresh()
    fit(Toy(), BlobsData(Blobs(101)), ours, max_epochs=EPOCHS)
    for callback, other in zip(ours, fresh(), strict=True):
        expected = to_jsonable(callback.state_dict())
        changed(callback.state_dict())
        assert to_jsonable(callback.state_dict()) == expected
        handed_in = callback.state_dict()
        other.load_state_dict(handed_in)
        changed(handed_in)
        assert to_jsonable(other.state_dict()) == expected
    provenance = ours[0].provenance
    provenance["done"].clear()
    assert ours[0].provenance["done"]


def test_a_states_curves_do_not_go_on(tmp_path):
    report = UnlearnReport(tmp_path)
    report.load_state_dict({"curves": {"val_loss": [[0, 1.0]]}})
    state = report.state_dict()
    report._curves["val_loss"].append([1, 0.5])
    assert state == {"curves": {"val_loss": [[0, 1.0]]}}


def test_a_checkpoint_that_one_of_several_ranks_wrote_alone_has_its_evidence_gathered_anew(tmp_path):
    checkpoints(tmp_path, callbacks=[AttributionPartitionCallback(at_epoch=3)])
    path = tmp_path / "epoch=1.ckpt"
    held = torch.load(path, weights_only=True)
    assert held["callbacks"][PARTITION]["epochs_seen"] == [1, 2]
    held["callbacks"][PARTITION]["trajectory"] = {"is_part": True}
    torch.save(held, path)
    again = AttributionPartitionCallback(at_epoch=4)
    with pytest.warns(UserWarning, match="does not hold the evidence of all samples: .* Collecting evidence again"):
        fit(Toy(), BlobsData(Blobs(101)), [again], max_epochs=5, ckpt_path=path)
    # A pass stands in for the epoch before.
    assert again.collector.epochs_seen == [2, 3, 4]
    assert again.partition.epoch == 4
