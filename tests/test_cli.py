import sys
from pathlib import Path

import pytest
import torch

from lightning_unlearn import Partition
from lightning_unlearn.cli import main
from tests.callbacks.published import make_partition
from tests.ranks import run_python

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.yaml"

# A team's own module, data, command line and configuration: no line of it knows of the package.
TEAM_MODULE = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class TeamModel(L.LightningModule):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU())
        self.out = torch.nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TeamData(L.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(201, 8, generator=torch.Generator().manual_seed(0))
        y = torch.arange(201) % 2
        x[:, 0] += 6 * y - 3
        y[:40] = 1 - y[:40]
        return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
"""
TEAM_SCRIPT = """
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI

from team import TeamData, TeamModel


class Save(Callback):
    def on_train_end(self, trainer, pl_module):
        trainer.callbacks[PLACE].partition.save("partition.pt")


if __name__ == "__main__":
    LightningCLI(TeamModel, TeamData)
"""
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
      init_args: {at_epoch: 5, recipe: auto}
    - class_path: lightning_unlearn.SensitivityPruneCallback
      init_args: {layer: encoder.0, amount: 0.25, significance: null, guard: false}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: saved, filename: last}
"""


def run(arguments, folder):
    result = run_python(folder, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def team(tmp_path):
    (tmp_path / "team.py").write_text(TEAM_MODULE)
    (tmp_path / "run.yaml").write_text(CALLBACKS)
    return tmp_path


def partition_of_checkpoint(folder):
    import torch

    callbacks = torch.load(folder / "saved" / "last.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in callbacks.items() if "AttributionPartition" in key)
    return Partition.from_state_dict(state["partition"])


def test_a_yaml_runs_through_our_command_and_a_users_own_cli_alike(team):
    with_classes = "model: {class_path: team.TeamModel, init_args: {width: 16}}\ndata: {class_path: team.TeamData}\n"
    (team / "ours.yaml").write_text(with_classes + CALLBACKS)
    # A module in the folder where the command is run is found, as a team's script would find it.
    shown = run(["-m", "lightning_unlearn.cli", "fit", "--config", "ours.yaml"], team)
    assert "Partition after 5 epochs" in shown
    assert "Pruned 4 of 16 neurons of 'encoder.0'" in shown
    assert "Fine-tuning from epoch 5" in shown
    ours = partition_of_checkpoint(team)

    (team / "saved" / "last.ckpt").unlink()
    (team / "config.yaml").unlink()  # LightningCLI saves what it ran and refuses to overwrite it
    (team / "script.py").write_text(TEAM_SCRIPT)
    run(["script.py", "fit", "--config", "run.yaml", "--model.width", "16"], team)
    theirs = partition_of_checkpoint(team)
    assert ours.clean_probability.equal(theirs.clean_probability)
    assert (~ours.is_clean[:40]).float().mean() > 0.9


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--trainer.max_epochs", "3", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", str(shorter(EXAMPLE, tmp_path)), *arguments])


def shorter(example, folder):
    text = example.read_text().replace("at_epoch: 20", "at_epoch: 2")
    (folder / "short.yaml").write_text(text)
    return folder / "short.yaml"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "demo"),
        (["demo", "--help"], "--fast"),
        (["report", "--help"], "--control"),
        (["--version"], "lightning-unlearn 0."),
        (["fit", "--help"], "--config"),
    ],
)
def test_help(arguments, shown, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 0
    assert shown in capsys.readouterr().out


def test_an_unknown_command_names_those_there_are(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["unlearn"])
    assert exit_info.value.code == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments", "advice"),
    [
        ("sklearn.datasets", ["demo", "--fast"], r"lightning-unlearn\[demo\]"),
        ("jsonargparse", ["fit", "--config", "x.yaml"], r"lightning-unlearn\[cli\]"),
    ],
)
def test_a_missing_extra_is_named(missing, arguments, advice, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises((ImportError, SystemExit), match=advice):
        main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "Expected a folder that UnlearnReport has written, but missing does not exist"),
        (["folder"], "but there is no partition.npz in it; add UnlearnReport"),
        (["run", "--control", "folder"], "but there is no partition.npz in it"),
        (["run", "--out", "folder"], "Expected a file to write, but folder is a folder"),
    ],
)
def test_a_folder_without_a_run_is_no_report(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    make_partition(torch.rand(20), torch.arange(20) % 4).save("run/partition.npz")
    with pytest.raises(SystemExit, match=f"lightning-unlearn report: .*{message}"):
        main(["report", *arguments])


def test_a_report_may_be_shown_at_once(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    make_partition(torch.rand(20), torch.arange(20) % 4).save(tmp_path / "partition.npz")
    main(["report", str(tmp_path), "--open"])
    assert shown == [(tmp_path / "report.html").as_uri()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "file"], "Expected a folder to write to, but file is a file; give another"),
        (["--out", "file/below"], "Expected a folder to write to, but .* is a file"),
        (["--json", "folder"], "Expected a file to write, but folder is a folder; give a name in it"),
    ],
)
def test_where_nothing_can_be_written_the_demo_says_so_before_it_trains(arguments, message, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    monkeypatch.setattr("lightning_unlearn.demo.arms.run_demo", lambda *_: pytest.fail("it trained"))
    with pytest.raises(SystemExit, match=f"lightning-unlearn demo: {message}"):
        main(["demo", "--fast", *arguments])
