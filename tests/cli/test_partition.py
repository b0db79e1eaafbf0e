"""``partition``: which training samples are wrong, with model and data as a team has them."""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from lightning_unlearn import Partition
from lightning_unlearn.cli import main
from lightning_unlearn.results.finding import finding_of
from tests.cli.conftest import RUN, enter

WRONG = torch.arange(201) < 40
ACTING = """
    - class_path: lightning_unlearn.AttributionPartitionCallback
      init_args:
        at_epoch: 4
        every_n_epochs: 1
        recipe:
          class_path: lightning_unlearn.recipes.get_recipe
          init_args: {recipe: auto, min_class_fraction: 0.2}
    - class_path: lightning_unlearn.SensitivityPruneCallback
    - class_path: lightning_unlearn.CleanSubsetFinetuneCallback
    - class_path: lightning_unlearn.UnlearnReport
      init_args: {class_names: [low, high], dir: elsewhere}
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The folder of a team that has judged its whole training, six epochs, and what was printed."""
    folder, patch, printed = tmp_path_factory.mktemp("judged"), pytest.MonkeyPatch(), []
    enter(folder, patch)
    (folder / "run.yaml").write_text(RUN)
    torch.set_num_threads(1)
    patch.setattr("builtins.print", lambda *values, sep=" ", **_: printed.append(sep.join(map(str, values))))
    main(["partition", "--config", "run.yaml", "--at_epoch", "6"])
    patch.undo()
    sys.modules.pop("team", None)
    return folder, "\n".join(printed)


@pytest.fixture
def inside(judged, monkeypatch):
    """In that folder, with a new process's view of the team's module."""
    enter(judged[0], monkeypatch)
    yield judged[0]
    sys.modules.pop("team", None)


def epochs_saved():
    return sorted(path.stem for path in Path("saved").iterdir())


def test_the_whole_training_is_judged_and_nothing_else_is_done(inside, judged):
    partition = Partition.load("partition/partition.npz")
    assert partition.epoch == 6
    assert ((~partition.is_clean) == WRONG).float().mean() > 0.9
    assert epochs_saved() == [f"epoch={k}" for k in range(6)]
    for name in ("suspects.csv", "report.html", "provenance.json", "config.yaml"):
        assert (inside / "partition" / name).stat().st_size > 100
    assert Path("partition/suspects.csv").read_text(encoding="utf-8-sig").count("\n") == 1 + len(
        partition.suspect_indices()
    )
    # The gallery of the report shows samples.
    assert len(json.loads(Path("partition/gallery.json").read_text())["samples"]) == len(partition.suspect_indices())
    said = judged[1]
    assert f"{len(partition.suspect_indices())} of 201 samples are suspect" in said
    assert f"The 10 most suspect of {len(partition.suspect_indices())}:" in said
    assert "\n  lightning-unlearn report partition --open\n" in said


def test_the_training_is_that_of_the_configuration(inside, monkeypatch):
    partitioned = torch.load("saved/epoch=5.ckpt", weights_only=True)["state_dict"]
    main(["fit", "--config", "run.yaml", "--trainer.callbacks.dirpath", "plain"])
    plain = torch.load("plain/epoch=5.ckpt", weights_only=True)["state_dict"]
    assert all(plain[name].equal(value) for name, value in partitioned.items())


def test_the_next_command_is_one_that_runs(inside, judged, capsys):
    _, _, command = judged[1].partition("Then train by it:\n")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["lightning-unlearn", "fit"]
    with pytest.raises(SystemExit) as exit_info:
        main([*words[1:], "--print_config"])
    assert exit_info.value.code == 0
    config = capsys.readouterr().out
    assert "review: partition/suspects.csv" in config
    assert "at_epoch: 6" in config
    assert "max_epochs: 9" in config
    assert "CleanSubsetFinetuneCallback" in config


def test_it_stops_at_the_partition_with_the_settings_of_the_configuration_but_acts_on_nothing(team, caplog, capsys):
    (team / "run.yaml").write_text(RUN.replace("  max_epochs", "  min_epochs: 6\n  max_epochs") + ACTING)
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    main(["partition", "--config", "run.yaml", "--out", "found", "--top", "3", "--recipe", "label"])
    partition = Partition.load("found/partition.npz")
    assert (partition.epoch, partition.recipe) == (4, "label")
    assert epochs_saved() == [f"epoch={k}" for k in range(4)]
    assert "Ignoring SensitivityPruneCallback, CleanSubsetFinetuneCallback" in caplog.text
    settings = json.loads(Path("found/provenance.json").read_text())["fits"][0]["settings"]
    assert list(settings) == ["AttributionPartitionCallback"]
    assert settings["AttributionPartitionCallback"]["min_class_fraction"] == 0.2
    assert "given_class" in Path("found/suspects.csv").read_text(encoding="utf-8-sig")
    assert not Path("elsewhere").exists()
    said = capsys.readouterr().out
    assert re.search(r"The 3 most suspect of 4\d:", said)
    assert "high" in said
    _, _, following = said.partition("Next:\n")
    assert following.splitlines()[2:] == [
        "  # with review: found/suspects.csv in init_args of the AttributionPartitionCallback:",
        "  lightning-unlearn fit --config run.yaml",
    ]


@pytest.mark.parametrize(
    ("asked", "epochs"), [([], {4, 5, 6}), (["--at_epoch", "auto"], {4, 5, 6}), (["--at_epoch", "0.5"], {3})]
)
def test_by_default_it_stops_once_the_evidence_has_peaked(team, asked, epochs):
    (team / "run.yaml").write_text(RUN)
    main(["partition", "--config", "run.yaml", *asked])
    partition = Partition.load("partition/partition.npz")
    assert partition.epoch in epochs
    assert epochs_saved() == [f"epoch={k}" for k in range(partition.epoch)]


def test_the_table_has_the_files_and_classes_of_an_image_folder(team, capsys):
    (team / "run.yaml").write_text(RUN.replace("TeamData", "TeamFolder"))
    main(["partition", "--config", "run.yaml", "--trainer.max_epochs", "4", "--top", "1"])
    title, first = Path("partition/suspects.csv").read_text(encoding="utf-8-sig").splitlines()[:2]
    row = dict(zip(title.split(","), first.split(","), strict=True))
    assert row["file"] == f"{row['given_class']}/{row['index']}.png"
    table = capsys.readouterr().out.partition("most suspect of ")[2].splitlines()
    assert table[2].split()[:4] == [row["index"], row["file"], row["given_class"], row["suggested_class"]]


def test_how_sure_suspects_are_to_be(team):
    (team / "run.yaml").write_text(RUN)
    with pytest.raises(SystemExit, match=r"suspect_precision to lie in \[0.5, 1\), but got 1.5"):
        main(["partition", "--config", "run.yaml", "--suspect_precision", "1.5"])
    assert not list(Path("partition").glob("*"))
    main(["partition", "--config", "run.yaml", "--suspect_precision", "0.97"])
    settings = json.loads(Path("partition/provenance.json").read_text())["fits"][0]["settings"]
    assert settings["AttributionPartitionCallback"]["suspect_precision"] == 0.97
    assert json.loads(Path("partition/run.json").read_text())["suspect_precision"] == 0.97


@pytest.mark.parametrize("name", ["suspects.csv", "validation_suspects.csv"])
def test_decisions_of_a_person_are_seen_before_training(team, name):
    (team / "run.yaml").write_text(RUN)
    Path("partition").mkdir()
    Path("partition", name).write_text("index,decision\n3,keep\n")
    with pytest.raises(SystemExit, match=f"partition/{name} contains 1 decision, which would be lost"):
        main(["partition", "--config", "run.yaml"])
    assert [file.name for file in Path("partition").iterdir()] == [name]


def test_validation_samples_are_judged_on_request(team, capsys):
    (team / "run.yaml").write_text(RUN.replace("TeamModel", "Validating").replace("TeamData", "Validated"))
    main(["partition", "--config", "run.yaml", "--trainer.max_epochs", "4", "--judge_validation"])
    out = capsys.readouterr().out
    assert "validation_partition.npz, validation_suspects.csv" in out
    partition = Partition.load("partition/validation_partition.npz")
    lines = Path("partition/validation_suspects.csv").read_text(encoding="utf-8-sig").count("\n")
    assert lines == 1 + len(partition.suspect_indices())
    assert (partition.is_clean.logical_not() == (torch.arange(101) < 20)).float().mean() > 0.9
    assert json.loads(Path("partition/provenance.json").read_text())["validation"]["samples"] == 101
    said = f"Validation set, 101 samples: {finding_of(partition)} (validation_suspects.csv)."
    assert said in out.splitlines()


def test_the_partition_of_validation_samples_that_a_checkpoint_holds_is_written_too(team):
    run = RUN.replace("TeamModel", "Validating").replace("TeamData", "Validated")
    (team / "run.yaml").write_text(run + ACTING.replace("at_epoch: 4", "at_epoch: 4\n        judge_validation: true"))
    main(["fit", "--config", "run.yaml"])
    main(["partition", "--config", "run.yaml", "--ckpt_path", "saved/epoch=5.ckpt", "--judge_validation"])
    assert len(Partition.load("partition/validation_partition.npz")) == 101


def test_what_early_stopping_leaves_is_judged(team, caplog):
    stopping = """
    - class_path: team.StopEarly
      init_args: {epoch: 1}
"""
    (team / "run.yaml").write_text(RUN + stopping)
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    main(["partition", "--config", "run.yaml"])
    assert "The partition is computed after 2 epochs: training has ended." in caplog.text
    assert Partition.load("partition/partition.npz").epoch == 2


def test_a_checkpoint_of_before_is_trained_on_from(inside):
    main(
        [
            "partition",
            "--config",
            "run.yaml",
            "--ckpt_path",
            "saved/epoch=2.ckpt",
            "--out",
            "resumed",
            "--at_epoch",
            "6",
        ]
    )
    resumed, whole = Partition.load("resumed/partition.npz"), Partition.load("partition/partition.npz")
    assert resumed.epoch == 6
    fits = json.loads(Path("resumed/provenance.json").read_text())["fits"]
    assert [fit["from_epoch"] for fit in fits] == [0, 3]
    assert (resumed.is_clean == whole.is_clean).float().mean() > 0.95


def test_a_checkpoint_past_it_is_judged_with_the_evidence_that_it_holds(inside, capsys):
    arguments = ["--ckpt_path", "saved/epoch=5.ckpt", "--at_epoch", "4", "--out", "past"]
    before = epochs_saved()
    main(["partition", "--config", "run.yaml", *arguments])
    assert epochs_saved() == before
    past, whole = Partition.load("past/partition.npz"), Partition.load("partition/partition.npz")
    assert past.epoch == 6
    assert past.clean_probability.equal(whole.clean_probability)
    assert "Computed from a single pass" not in capsys.readouterr().out


@pytest.mark.parametrize("memorized", [False, True])
def test_of_one_without_evidence_one_pass_is_judged_and_what_it_cannot_tell_is_said(memorized, inside, capsys):
    checkpoint = torch.load("saved/epoch=5.ckpt", weights_only=True)
    checkpoint["callbacks"] = {}
    if memorized:
        # A network that gives the same label to nearly all, and data that are called so.
        checkpoint["state_dict"]["out.weight"].mul_(0)
        checkpoint["state_dict"]["out.weight"][1] += 1
        source = Path("team.py").read_text()
        Path("team.py").write_text(source.replace("y[:40] = 1 - y[:40]", "y[:190] = 1"))
    torch.save(checkpoint, "bare.ckpt")
    main(["partition", "--config", "run.yaml", "--ckpt_path", "bare.ckpt", "--out", "bare"])
    said = capsys.readouterr().out
    assert "Computed from a single pass: the checkpoint contains no evidence of earlier epochs." in said
    assert (
        "no recipe can detect them from one pass. Corrupted inputs can still be detected (--recipe input)" in said
    ) == memorized
    assert ("wrong labels can be detected among the others, with less certainty" in said) == (not memorized)


def test_a_partition_that_a_checkpoint_holds_is_shown(team, capsys):
    named = RUN.replace("TeamData", "TeamFolder")
    (team / "run.yaml").write_text(named + ACTING.replace("class_names: [low, high], ", ""))
    main(["fit", "--config", "run.yaml"])
    held = ["partition", "--config", "run.yaml", "--ckpt_path", "saved/epoch=5.ckpt"]
    capsys.readouterr()
    main(held)
    said = capsys.readouterr().out
    assert "This partition was in saved/epoch=5.ckpt; nothing was trained." in said
    assert "low" in said
    assert (
        Path("partition/suspects.csv").read_text(encoding="utf-8-sig").startswith("index,file,given_label,given_class,")
    )
    assert json.loads(Path("partition/gallery.json").read_text())["samples"]
    assert "CleanSubsetFinetuneCallback" in json.loads(Path("partition/provenance.json").read_text())["done"]
    main(["show", "saved/epoch=5.ckpt"])
    assert capsys.readouterr().out.startswith(said.strip().splitlines()[0])
    with pytest.raises(
        SystemExit, match=r"already contains a partition \(recipe auto\).*Leave out --recipe input to see it"
    ):
        main([*held, "--recipe", "input"])
    with pytest.raises(
        SystemExit, match=r"already contains a partition, but none of the validation set\. Leave out --judge_val"
    ):
        main([*held, "--judge_validation"])
    # Of another length: Python takes compiled code for that of a file of the same length and second.
    (team / "team.py").write_text((team / "team.py").read_text().replace("201", "99"))
    sys.modules.pop("team")
    with pytest.raises(SystemExit, match=r"201 training samples of the partition of saved/epoch=5.ckpt, but the data"):
        main(held)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["partition.npz"], "To see a saved partition: lightning-unlearn show partition.npz"),
        (["--at_epoch", "0"], "Expected at_epoch to be 'auto', a whole number of epochs of at least 1, or a share"),
        (
            ["--at_epoch", "0.5", "--trainer.max_epochs", "-1"],
            "at_epoch=0.5 is a share of max_epochs, but the Trainer has",
        ),
        (["--at_epoch", "7"], "Expected at_epoch to be less than the Trainer's max_epochs"),
        (["--recipe", "labels"], "Did you mean 'label'"),
        (["--out", "run.yaml"], "Expected a folder to write to, but run.yaml is a file"),
        (["--trainer.fast_dev_run", "true"], "fast_dev_run trains too little"),
        (["--ckpt_path", "weights.ckpt"], "contains weights only .* Pass another one, or train without --ckpt_path"),
    ],
)
def test_a_wrong_wish_is_refused_before_anything_is_trained(arguments, message, team, monkeypatch):
    torch.save({"state_dict": {}}, "weights.ckpt")
    monkeypatch.setattr("lightning.pytorch.loops.fit_loop._FitLoop.advance", lambda _: pytest.fail("it trained"))
    where = [] if arguments == ["partition.npz"] else ["--config", "run.yaml"]
    with pytest.raises(SystemExit, match=message):
        main(["partition", *where, *arguments])


def shown(folder="partition"):
    return len(json.loads(Path(folder, "gallery.json").read_text(encoding="utf-8"))["samples"])


def test_the_report_shows_as_many_samples_as_are_asked_for_also_afterwards(inside, capsys):
    main(["partition", "--config", "run.yaml", "--at_epoch", "6", "--samples", "5", "--out", "few"])
    assert shown("few") == 5
    # The command that follows is one of fit, which has no such option.
    assert "--samples" not in capsys.readouterr().out.partition("lightning-unlearn fit")[2]
    before = Partition.load("few/partition.npz")
    main(["report", "few", "--samples", "12"])
    assert shown("few") == 12
    assert torch.equal(Partition.load("few/partition.npz").clean_probability, before.clean_probability)
    assert Path("few/report.html").read_text(encoding="utf-8").count('{"index":') == 12
    # Of the configuration of the fit, where the run directory has none.
    Path("few/config.yaml").unlink()
    with pytest.raises(SystemExit, match=r"there is no few.config.yaml. Pass it with --config FILE"):
        main(["report", "few", "--samples", "7"])
    main(["report", "few", "--samples", "7", "--config", "run.yaml"])
    assert shown("few") == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "0"], "--samples"),
        (["--config", "run.yaml"], "--config, --model and --data need --samples N"),
        (["--samples", "5", "--config", "run.yaml", "--data.train_size", "9"], "unrecognized arguments"),
    ],
)
def test_samples_that_cannot_be_read_are_refused(inside, capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        main(["report", "partition", *arguments])
    assert words in str(error.value) + capsys.readouterr().err


def test_samples_of_other_data_are_refused(inside):
    partition = Partition.load("partition/partition.npz")
    Path("other").mkdir(exist_ok=True)
    dataclasses.replace(partition, fingerprint="201:" + "00" * 64).save("other/partition.npz")
    with pytest.raises(SystemExit, match="Expected the training data that the checkpoint was made with"):
        main(["report", "other", "--samples", "5", "--config", "run.yaml"])
