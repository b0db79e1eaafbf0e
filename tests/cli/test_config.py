"""``fit``: LightningCLI with our callbacks, from a YAML."""

import logging
import re
import sys

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_unlearn import AttributionPartitionCallback, DataFormat, Partition
from lightning_unlearn.cli import main
from lightning_unlearn.data.batch import split_batch
from tests.cli.conftest import RUN

CALLBACKS = """
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 8
  logger: false
  enable_checkpointing: true
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_unlearn.CleanSubsetFinetuneCallback
      init_args:
        mode: full
        lr: 1.0e-2
        optimizer: {class_path: torch.optim.Adam, init_args: {lr: 1.0e-3}}
        lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 3}}
    - class_path: lightning_unlearn.AttributionPartitionCallback
      init_args: {at_epoch: 5, recipe: auto, data: {task: multiclass, ignore_index: -1}}
    - class_path: lightning_unlearn.SensitivityPruneCallback
      init_args:
        layer: encoder.0
        amount: 0.25
        criterion: {class_path: lightning_unlearn.pruning.criteria.Sensitivity, init_args: {fdr_level: null}}
        max_val_drop: null
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: saved, filename: last}
"""


def partition_of_checkpoint():
    callbacks = torch.load("saved/last.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in callbacks.items() if "AttributionPartition" in key)
    return Partition.from_state_dict(state["partition"])


def test_a_yaml_runs_through_our_command_and_a_users_own_cli_alike(team, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    with_classes = "model: {class_path: team.TeamModel, init_args: {width: 16}}\ndata: {class_path: team.TeamData}\n"
    (team / "ours.yaml").write_text(with_classes + CALLBACKS)
    # A module in the folder where the command is run is found, as a team's script would find it.
    main(["fit", "--config", "ours.yaml"])
    for said in ("Partition after 5 epochs", "Pruned 4 of 16 neurons of 'encoder.0'", "Fine-tuning from epoch 5"):
        assert said in caplog.text
    ours = partition_of_checkpoint()

    (team / "saved" / "last.ckpt").unlink()
    (team / "config.yaml").unlink()  # LightningCLI saves what it ran and refuses to overwrite it
    from team import TeamData, TeamModel

    (team / "theirs.yaml").write_text(CALLBACKS)
    LightningCLI(TeamModel, TeamData, args=["fit", "--config", "theirs.yaml", "--model.width", "16"])
    theirs = partition_of_checkpoint()
    assert ours.clean_probability.equal(theirs.clean_probability)
    assert (~ours.is_clean[:40]).float().mean() > 0.9


@pytest.mark.parametrize("command", ["fit", "partition"])
def test_a_yaml_of_a_users_own_script_runs_where_its_classes_are_named(command, team, capsys):
    """As LightningCLI(TeamModel, TeamData) reads it, and has saved it."""
    sys.path.insert(0, str(team))  # as of a script that lies there
    from team import TeamData, TeamModel

    given = re.sub(r"model: .*\ndata: .*\n", "model: {width: 16}\n", RUN)
    (team / "theirs.yaml").write_text(given)
    LightningCLI(TeamModel, TeamData, args=["fit", "--config", "theirs.yaml", "--trainer.max_epochs", "1"])
    saved = "config.yaml"
    classes = ["--model", "team.TeamModel", "--data=team.TeamData"]
    for file in ("theirs.yaml", saved):
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--config", file, *classes, "--trainer.max_epochs", "3", "--print_config"])
        assert exit_info.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["model"] == {"width": 16}
    main([command, "--config", "theirs.yaml", *classes, "--trainer.max_epochs", "3", "--trainer.logger", "true"])
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--config", "theirs.yaml"])
    assert exit_info.value.code == (
        f"lightning-unlearn {command}: error: theirs.yaml has the arguments of your model under 'model:', but not its"
        " class, as where a script has LightningCLI(Net, Data); name the class: --model team.Net --data team.Data."
    )


def test_the_configuration_is_printed_and_a_fit_goes_on_from_a_checkpoint(team, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", "run.yaml", "--trainer.max_epochs", "2", "--print_config"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    (team / "printed.yaml").write_text(printed)
    main(["fit", "--config", "printed.yaml"])
    (team / "config.yaml").unlink()
    main(["fit", "--config", "run.yaml", "--ckpt_path", "saved/epoch=1.ckpt", "--trainer.max_epochs", "3"])
    last = torch.load("saved/epoch=2.ckpt", weights_only=True)
    assert last["global_step"] == 3 * 13
    # What it would overwrite is not a bug to be read of in a traceback.
    with pytest.raises(
        SystemExit, match=r"lightning-unlearn fit: error: SaveConfigCallback expected .*config.yaml to NOT exist"
    ):
        main(["fit", "--config", "run.yaml"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nosuch.yaml"], "File does not exist"),
        (["--config", "bad.yaml"], "does not accept option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        (["--config", "callback.yaml"], "'epock' is not accepted by StopEarly; did you mean 'epoch'?"),
        (["--config", "run.yaml", "--trainer.max_epochs", "many"], 'Parser key "trainer.max_epochs"'),
        (["--config", "run.yaml", "--nosuch", "3"], "unrecognized arguments: --nosuch 3"),
        (["--config", "run.yaml", "--model", "team.Nosuch"], "team.Nosuch"),
        (["--config", "run.yaml", "--model", "gone.Net"], "Run the command in the folder that contains 'gone'"),
        (["--config", "below.yaml"], "below.yaml has its settings below 'fit:'; move them to the top"),
        (["--config", "broken.yaml"], "broken.yaml, line 3: invalid YAML"),
    ],
)
def test_a_wrong_call_is_told_in_a_line_and_not_in_a_page(arguments, message, team, capsys):
    (team / "broken.yaml").write_text("model:\n  class_path: team.TeamModel\n    width: 16\n")
    (team / "callback.yaml").write_text(f"{RUN}    - {{class_path: team.StopEarly, init_args: {{epock: 1}}}}\n")
    (team / "below.yaml").write_text("fit:" + RUN.replace("\n", "\n  "))
    (team / "bad.yaml").write_text(RUN.replace("max_epochs", "max_epoch"))
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", *arguments])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("lightning-unlearn fit: error: ")
    assert said.endswith("The options are shown by: lightning-unlearn fit --help\n")
    assert message in said
    assert "usage:" not in said


def test_a_checkpoint_that_is_not_there_is_named_before_anything_is_made(team):
    with pytest.raises(
        SystemExit, match=r"fit: error: Expected --ckpt_path to name a checkpoint, but nosuch.ckpt does not exist"
    ):
        main(["fit", "--config", "run.yaml", "--model", "team.Broken", "--ckpt_path", "nosuch.ckpt"])


def test_a_misconfiguration_is_one_sentence(team):
    ours = "--trainer.callbacks+=lightning_unlearn.SensitivityPruneCallback"
    with pytest.raises(SystemExit, match="fit: error: SensitivityPruneCallback needs an AttributionPartitionCallback"):
        main(["fit", "--config", "run.yaml", ours])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("lr: 1.0e-2", "lr: .inf"), "Expected lr to be a finite number greater than 0, but got inf."),
        (("lr: 1.0e-2", "lr: .nan"), "Expected lr to be a finite number greater than 0, but got nan."),
        (("recipe: auto", "suspect_precision: .inf"), "Expected suspect_precision to lie in [0.5, 1), but got inf."),
        (("layer: encoder.0", "layer: []"), "Expected layer to name at least one layer, and each once, but got []."),
        (
            ("data: {task: multiclass, ignore_index: -1}", "data: {ignore_index: .inf}"),
            "Expected ignore_index to be a finite number, the label that means none, NaN, or None, but got inf.",
        ),
    ],
    ids=["infinite", "nan", "suspect_precision", "empty", "data"],
)
def test_an_argument_that_is_refused_is_one_sentence(wrong, message, team):
    with_classes = "model: {class_path: team.TeamModel, init_args: {width: 16}}\ndata: {class_path: team.TeamData}\n"
    (team / "wrong.yaml").write_text(with_classes + CALLBACKS.replace(*wrong))
    with pytest.raises(SystemExit, match=f"^{re.escape(f'lightning-unlearn fit: error: {message}')}$"):
        main(["fit", "--config", "wrong.yaml"])


@pytest.mark.parametrize(
    "data",
    [
        "{task: binary, batch_to_xy: lightning_unlearn.data.batch.split_batch}",
        "{class_path: lightning_unlearn.DataFormat, init_args: {task: binary, batch_to_xy:"
        " lightning_unlearn.data.batch.split_batch}}",
    ],
    ids=["fields", "class_path"],
)
def test_how_data_are_read_is_a_mapping_in_yaml_or_an_object(data, team):
    (team / "run.yaml").write_text(CALLBACKS.replace("{task: multiclass, ignore_index: -1}", data))
    sys.path.insert(0, str(team))
    from team import TeamModel

    cli = LightningCLI(TeamModel, run=False, args=["--config", "run.yaml"])
    (partition,) = [one for one in cli.trainer.callbacks if isinstance(one, AttributionPartitionCallback)]
    assert partition.data == DataFormat(task="binary", batch_to_xy=split_batch)


def test_a_field_that_data_do_not_have_is_named_with_the_nearest(team, capsys):
    (team / "wrong.yaml").write_text(CALLBACKS.replace("task: multiclass", "tusk: multiclass"))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "wrong.yaml", "--model", "team.TeamModel", "--data", "team.TeamData"])
    assert "'tusk' is not accepted by DataFormat; did you mean 'task'?" in capsys.readouterr().err
