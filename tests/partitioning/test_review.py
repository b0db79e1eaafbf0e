"""What a person has decided in a table holds in the next fit, and only in one of the same data."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unlearn import AttributionPartitionCallback, CleanSubsetFinetuneCallback, DataFormat, Partition
from lightning_unlearn.recipes import RecipeResult
from lightning_unlearn.results.labels import DECISIONS, DROP, KEEP, RELABEL
from tests.toys import CLASSES, Blobs, BlobsData, IndexRecorder, Toy, assert_same_weights, fit, trio, weights

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{line}:UserWarning")
    for line in (
        "You defined a `validation_step`",
        "Be aware that when using `ckpt_path`",
        "You.re resuming",
        "Partition not applied",
    )
]
SIZE, AT, EPOCHS = 101, 1, 3
MARGINS = {"recipe": "aum"}


def rows_of(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0].keys(), extrasaction="ignore", delimiter=";")
        table.writeheader()
        table.writerows(rows)


def run(data, *, review=None, folder=None, ckpt_path=None, at=AT, finetune=None, size=16, **kwargs):
    """A fit with the partition and the fine-tuning, and what it trained on."""
    partition, _, tune = trio(at, review=review, finetune=finetune, **(MARGINS | kwargs))
    record, module = IndexRecorder(data), Toy()
    extra = []
    if folder is not None:
        extra = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)]
    fit(
        module,
        BlobsData(data, by_epoch=True, batch_size=size),
        [partition, tune, record, *extra],
        ckpt_path=ckpt_path,
        max_epochs=EPOCHS,
        enable_checkpointing=bool(extra),
    )
    return partition, tune, record, module


@pytest.fixture(scope="module")
def data():
    return Blobs(SIZE)


@pytest.fixture(scope="module")
def reviewed(data, tmp_path_factory):
    """A table of all samples, and one in which a person has kept, dropped and re-labeled what was not so."""
    folder = tmp_path_factory.mktemp("review")
    first, tune, _, module = run(data)
    first.partition.to_csv(folder / "suspects.csv", suspects_only=False)
    rows = rows_of(folder / "suspects.csv")
    suspects = [row for row in rows if row["proposed"] != "keep"]
    clean = [row for row in rows if row["proposed"] == "keep"]
    edited = []
    for row, decision in zip(
        [*suspects[:6], *clean[:6]], ["keep"] * 3 + ["relabel"] * 3 + ["drop"] * 3 + ["relabel"] * 3, strict=True
    ):
        new = (int(row["given_label"]) + 1) % CLASSES
        edited.append(row | {"decision": decision, "suggested_label": new if decision == "relabel" else ""})
    write(folder / "edited.csv", edited)
    # Of all samples, what is proposed.
    write(folder / "confirmed.csv", [row | {"decision": row["proposed"]} for row in rows])
    wanted = {int(row["index"]): DECISIONS.index(row["decision"]) for row in edited}
    return {
        "first": first.partition,
        "draw": tune.training_subset,
        "weights": weights(module),
        "all": folder / "suspects.csv",
        "edited": folder / "edited.csv",
        "confirmed": folder / "confirmed.csv",
        "wanted": wanted,
    }


def of(wanted, decision):
    return sorted(index for index, code in wanted.items() if code == decision)


@pytest.mark.parametrize("threshold", [0.05, 0.999])
def test_what_is_proposed_is_what_the_fit_did(data, tmp_path, threshold):
    partition, tune, _, _ = run(data, finetune={"on_noisy": "relabel", "relabel_threshold": threshold})
    partition.partition.save(tmp_path / "partition.npz")
    saved = Partition.load(tmp_path / "partition.npz")
    assert saved.relabel_threshold == threshold
    saved.to_csv(tmp_path / "suspects.csv")
    rows = rows_of(tmp_path / "suspects.csv")
    proposed = sorted(int(row["index"]) for row in rows if row["proposed"] == "relabel")
    assert proposed == tune.training_subset.relabeled.tolist()
    assert bool(proposed) == (threshold < 0.5)


def test_a_table_that_nobody_has_filled_decides_nothing(data, reviewed):
    with pytest.warns(UserWarning, match=r"No decisions in .*suspects.csv: its column 'decision' is empty"):
        partition, _, _, module = run(data, review=reviewed["all"])
    assert partition.provenance["review"] is None
    assert_same_weights(weights(module), reviewed["weights"])


@pytest.mark.parametrize("table", ["all", "confirmed"])
@pytest.mark.parametrize("on_noisy", ["drop", "relabel"])
def test_an_unedited_table_changes_nothing_of_what_is_trained_on(data, reviewed, on_noisy, table):
    _, plain, _, module = run(data, finetune={"on_noisy": on_noisy})
    _, tune, _, again = run(data, review=reviewed[table], finetune={"on_noisy": on_noisy})
    assert tune.training_subset.index.tolist() == plain.training_subset.index.tolist()
    assert tune.training_subset.relabeled.tolist() == plain.training_subset.relabeled.tolist()
    assert len(plain.training_subset.relabeled) > 0 or on_noisy == "drop"
    assert_same_weights(weights(again), weights(module))


def test_decisions_override_the_partition_for_their_samples_alone(data, reviewed):
    partition, tune, record, _ = run(data, review=str(reviewed["edited"]), min_class_fraction=0.5)
    before, after, wanted = reviewed["first"], partition.partition, reviewed["wanted"]
    kept, dropped, moved = (of(wanted, code) for code in (KEEP, DROP, RELABEL))
    assert [len(kept), len(dropped), len(moved)] == [3, 3, 6]
    assert not before.is_clean[kept].any()
    assert before.is_clean[dropped].all()
    assert (after.clean_probability[kept] == 1).all()
    assert after.is_clean[kept].all()
    assert (after.clean_probability[dropped] == 0).all()
    assert not after.is_clean[dropped + moved].any()
    assert after.suggested_label[moved].equal((data.y[moved] + 1) % CLASSES)
    others = [index for index in range(SIZE) if index not in wanted]
    assert after.clean_probability[others].equal(before.clean_probability[others])
    trained = set(record.by_epoch[EPOCHS - 1])
    assert trained == set(tune.training_subset.index.tolist())
    assert trained >= set(kept)
    assert not trained & {*dropped, *moved}
    # All the data until then.
    assert set(record.by_epoch[AT - 1]) == set(range(SIZE))


def test_samples_are_trained_on_under_the_label_that_was_decided(data, reviewed):
    partition, tune, _, _ = run(data, review=reviewed["edited"], finetune={"on_noisy": "relabel"})
    kept, dropped, moved = (of(reviewed["wanted"], code) for code in (KEEP, DROP, RELABEL))
    assert set(moved) <= set(tune.training_subset.relabeled.tolist())
    assert tune.training_subset.new_label[moved].equal((data.y[moved] + 1) % CLASSES)
    assert (tune.training_subset.new_label[kept] == -1).all()
    assert not set(dropped) & set(tune.training_subset.index.tolist())
    assert partition.partition.decisions() == [
        {KEEP: "keep", DROP: "drop", RELABEL: "relabel"}.get(reviewed["wanted"].get(index), decision)
        for index, decision in enumerate(reviewed["first"].decisions())
    ]


def test_samples_are_weighed_by_what_was_decided(data, reviewed):
    _, tune, _, _ = run(data, review=reviewed["edited"], finetune={"on_noisy": "reweight"})
    kept, dropped, moved = (of(reviewed["wanted"], code) for code in (KEEP, DROP, RELABEL))
    weight = dict(zip(tune.training_subset.index.tolist(), tune.training_subset.probability.tolist(), strict=True))
    assert [weight[index] for index in kept] == [1, 1, 1]
    assert not {*dropped, *moved} & weight.keys()


def test_every_round_goes_by_it(data, reviewed):
    partition, tune, _, _ = run(data, review=reviewed["edited"], every_n_epochs=1, min_change=0.0)
    assert len(partition.rounds) == EPOCHS - AT
    assert partition.partition.is_clean[of(reviewed["wanted"], KEEP)].all()
    assert not set(of(reviewed["wanted"], DROP)) & set(tune.training_subset.index.tolist())


def test_decisions_hold_where_the_recipe_is_not_to_be_acted_upon(data, tmp_path, recwarn):
    def says_nothing(evidence):
        return RecipeResult(torch.rand(len(evidence.index)), evidence.prediction, warning="it cannot be told")

    write(tmp_path / "suspects.csv", [{"index": k, "decision": "drop"} for k in (3, 8)])
    partition, tune, _, _ = run(data, review=tmp_path / "suspects.csv", recipe=says_nothing)
    assert partition.partition.is_actionable
    assert partition.partition.suspect_indices().sort().values.tolist() == [3, 8]
    assert any(
        "The recipe was inconclusive (it cannot be told). Samples without a decision in" in str(one.message)
        for one in recwarn
    )
    assert tune.training_subset.index.tolist() == [index for index in range(SIZE) if index not in (3, 8)]


@pytest.mark.parametrize("with_file", [True, False], ids=["with the file", "without it"])
def test_a_resumed_fit_goes_by_it(data, reviewed, tmp_path, with_file):
    whole, tune, _, module = run(data, review=reviewed["edited"], folder=tmp_path, every_n_epochs=1, min_change=0.0)
    for epoch in (0, 1):  # before the partition, and after the first
        review = reviewed["edited"] if with_file else None
        again, tune_again, _, resumed = run(
            data, review=review, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", every_n_epochs=1, min_change=0.0
        )
        assert again.partition.clean_probability.equal(whole.partition.clean_probability)
        assert tune_again.training_subset.index.equal(tune.training_subset.index)
        assert_same_weights(weights(resumed), weights(module))


def test_other_decisions_than_those_of_a_partition_that_is_drawn_are_refused(data, reviewed, tmp_path):
    run(data, review=reviewed["edited"], folder=tmp_path / "with")
    run(data, folder=tmp_path / "without")
    with pytest.raises(ValueError, match=r"before the partition is computed, but .* with other decisions \(.*edited"):
        run(data, review=reviewed["all"], ckpt_path=tmp_path / "with" / "epoch=1.ckpt")
    with pytest.raises(ValueError, match="partition of the checkpoint was computed without decisions"):
        run(data, review=reviewed["confirmed"], ckpt_path=tmp_path / "without" / "epoch=1.ckpt")
    partition, _, _, _ = run(data, review=reviewed["edited"], ckpt_path=tmp_path / "without" / "epoch=0.ckpt")
    assert partition.partition.is_clean[of(reviewed["wanted"], KEEP)].all()


def refused_before_the_first_step(data, message, error=ValueError, data_format=None, **kwargs):
    module = Toy()
    callback = AttributionPartitionCallback(at_epoch=AT, data=data_format, **(MARGINS | kwargs))
    before = weights(module)
    with pytest.raises(error, match=message):
        fit(module, BlobsData(data), [callback, CleanSubsetFinetuneCallback()], max_epochs=EPOCHS)
    assert module.steps == 0
    assert_same_weights(weights(module), before)


def test_a_table_of_other_data_is_refused_before_the_first_step(reviewed):
    path = reviewed["all"]
    refused_before_the_first_step(Blobs(SIZE + 1), "to this training set of 102 samples, .* another .101", review=path)
    refused_before_the_first_step(Blobs(SIZE, seed=1), "but 100% of those compared differ", review=path)
    path = reviewed["confirmed"]
    message = "line [0-9]+: expected given_label to be the label of sample"
    refused_before_the_first_step(Blobs(SIZE, seed=1), message, review=path, data_format=DataFormat(verify=False))
    refused_before_the_first_step(Blobs(SIZE, augment="torch", seed=1), message, review=path)


def test_what_is_wrong_in_a_table_is_refused_before_the_first_step(data, tmp_path):
    path = tmp_path / "suspects.csv"
    refused_before_the_first_step(data, "suspects.csv does not exist", FileNotFoundError, review=path)
    write(path, [{"index": 3, "decision": "hold"}])
    refused_before_the_first_step(data, "line 2: expected decision to be keep, drop or relabel", review=path)
    write(path, [{"index": 3, "decision": "keep"}, {"index": SIZE, "decision": "drop"}])
    refused_before_the_first_step(data, r"line 3: expected index to lie in \[0, 101\)", review=path)
    write(path, [{"index": 3, "decision": "relabel", "suggested_label": 4}])
    refused_before_the_first_step(data, r"line 2: expected suggested_label to be in \[0, 4\)", review=path)


def test_a_table_of_augmented_samples_is_known_by_their_number_and_labels(tmp_path):
    data = Blobs(SIZE, augment="torch")
    callback = AttributionPartitionCallback(at_epoch=AT, **MARGINS)
    fit(Toy(), BlobsData(data), [callback], max_epochs=2)
    callback.partition.to_csv(tmp_path / "suspects.csv")
    rows = rows_of(tmp_path / "suspects.csv")
    assert rows[0]["dataset"] == f"n{SIZE}-"
    write(tmp_path / "suspects.csv", [row | {"decision": "keep"} for row in rows])
    again = AttributionPartitionCallback(at_epoch=AT, review=tmp_path / "suspects.csv", **MARGINS)
    fit(Toy(), BlobsData(data), [again], max_epochs=2)
    assert again.partition.is_clean[[int(row["index"]) for row in rows]].all()


def test_labels_that_have_been_mended_since_are_left_to_the_recipe(data, tmp_path, recwarn):
    # The one that has been mended is not among the sixteen that are compared before training.
    rows = [{"index": k, "given_label": int(data.y[k]), "decision": "drop"} for k in range(40)]
    rows[1]["given_label"] = (rows[1]["given_label"] + 1) % CLASSES
    write(tmp_path / "suspects.csv", rows)
    partition, _, _, _ = run(data, review=tmp_path / "suspects.csv")
    assert (partition.partition.clean_probability[:40] == 0).nonzero().numel() == 39
    assert partition.partition.clean_probability[1] > 0
    assert any("1 decisions in" in str(warning.message) for warning in recwarn)


def test_several_labels(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 16, generator=generator)
    y = (x[:, :3] > 0).float()
    decisions = [
        {"index": 0, "suggested_label": "", "decision": "keep"},
        {"index": 1, "suggested_label": "", "decision": "drop"},
        {"index": 2, "suggested_label": " ".join(str(k) for k in range(3) if not y[2, k]), "decision": "relabel"},
    ]
    write(tmp_path / "suspects.csv", decisions)

    class Several(Toy):
        def training_step(self, batch):
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    tune = CleanSubsetFinetuneCallback(on_noisy="relabel")
    partition = AttributionPartitionCallback(
        at_epoch=1, data=DataFormat(task="multilabel"), review=tmp_path / "suspects.csv"
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    fit(Several(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))), loader, [partition, tune])
    found = partition.partition
    assert found.clean_probability[:3].tolist() == [1, 0, 0]
    assert found.label_probability[2].tolist() == [0, 0, 0]
    assert tune.training_subset.new_label[2].tolist() == (1 - y[2]).long().tolist()
    assert {0, 2} <= set(tune.training_subset.index.tolist())
    assert 1 not in tune.training_subset.index.tolist()
