"""``init``: the YAML that it prints is one that fit takes."""

import inspect
import re

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_unlearn
from lightning_unlearn.cli import main

DEMO = ["--model", "lightning_unlearn.demo.DigitsClassifier", "--data", "lightning_unlearn.demo.DigitsDataModule"]
PLAIN = ["--model", "team.TeamModel", "--data", "team.TeamData"]
TEAM = ["--model", "team.Needy", "--data", "team.TeamData"]
IN_USE = ("AttributionPartitionCallback", "CleanSubsetFinetuneCallback", "UnlearnReport")
CALLBACKS = (*IN_USE, "SensitivityPruneCallback")


def printed(arguments, capsys):
    main(["init", *arguments])
    return capsys.readouterr().out


def parsed(file, capsys, *arguments):
    """What ``fit`` would run."""
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", file, *arguments, "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def uncommented(text):
    """With every default set."""
    return re.sub(r"^( *)# (?= *(?:- class_path|\w+):(?! prunes))", r"\1", text, flags=re.M)


def test_of_the_demo_it_says_what_there_is_and_fit_takes_it(team, capsys):
    text = printed(DEMO, capsys)
    assert "# model:\n  # lr: 0.001  # float: learning rate of Adam." in text
    assert "  # noise: 0.4  # float: share of the training labels that are wrong" in text
    assert "## Layers, with their neurons: features.0 (32), features.3 (64), fc (128), head: the head" in text
    (team / "run.yaml").write_text(text)
    config = parsed("run.yaml", capsys, *DEMO)
    assert [one["class_path"].split(".")[-1] for one in config["trainer"]["callbacks"]] == list(IN_USE)


def test_nothing_is_set_and_every_line_that_is_uncommented_is_a_default_that_fit_takes(team, capsys):
    text = printed(PLAIN, capsys)
    (team / "all.yaml").write_text(uncommented(text))
    (team / "some.yaml").write_text(text)
    everything, some = parsed("all.yaml", capsys, *PLAIN), parsed("some.yaml", capsys, *PLAIN)
    assert everything["model"] == some["model"]["init_args"] == {"width": 32}
    # Pruning is taken in with the others.
    pruning = everything["trainer"]["callbacks"].pop()
    assert pruning["class_path"] == "lightning_unlearn.SensitivityPruneCallback"
    for key in ("trainer", "seed_everything"):
        assert everything[key] == some[key]


@pytest.mark.parametrize("text", ["as it is", "with every default set"])
def test_the_yaml_runs_in_a_users_own_cli_script(text, team, capsys):
    printed_text = printed(PLAIN, capsys)
    (team / "run.yaml").write_text(printed_text if text == "as it is" else uncommented(printed_text))
    from team import TeamData, TeamModel

    cli = LightningCLI(TeamModel, TeamData, args=["--config", "run.yaml", "--trainer.accelerator", "cpu"], run=False)
    ours = [type(one).__name__ for one in cli.trainer.callbacks if type(one).__name__ in CALLBACKS]
    assert sorted(ours) == sorted(IN_USE if text == "as it is" else CALLBACKS)


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_option_of_a_callback_stands_in_a_line_with_its_default_and_what_it_is(name, capsys):
    block = printed([], capsys).partition(f"lightning_unlearn.{name}  #")[2].partition("- class_path")[0]
    shown = re.findall(r"^ {4}(?: {4}# |# {5})(\w+): (.*?)  # (.+)$", block, re.M)
    parameters = list(inspect.signature(getattr(lightning_unlearn, name)).parameters.values())
    assert [option for option, _, _ in shown] == [one.name for one in parameters]
    for (option, value, what), one in zip(shown, parameters, strict=True):
        assert yaml.safe_load(value) == one.default, option
        assert 10 < len(what) <= 110, option
        assert not set(what) & set('`:"') or ": " in what, option


def test_what_has_no_default_is_a_placeholder_of_which_fit_tells(team, capsys):
    main(["init", *TEAM, "--out", "needy.yaml"])
    said = capsys.readouterr().out
    assert said == f"Written: needy.yaml\nNext:\n  lightning-unlearn partition --config needy.yaml {' '.join(TEAM)}\n"
    text = (team / "needy.yaml").read_text()
    assert "model:\n  width: '<fill in: int>'  # needed; int" in text
    assert "  # rates: [1.0e-05, 0.5]  # tuple[float, ...]" in text
    assert "the default is ReLU()" in text
    for command in ("fit", "partition"):
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--config", "needy.yaml", *TEAM])
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.startswith(
            f"lightning-unlearn {command}: error: needy.yaml has placeholders to fill in: model.width"
            " (<fill in: int>), model.name (<fill in: str>); replace them."
        )
    (team / "needy.yaml").write_text(text.replace("'<fill in: int>'", "16").replace("'<fill in: str>'", "net"))
    assert parsed("needy.yaml", capsys, *TEAM)["model"]["width"] == 16
    with pytest.raises(SystemExit, match=r"Expected a new file, but needy.yaml exists"):
        main(["init", *TEAM, "--out", "needy.yaml"])


def test_without_classes_they_are_named_with_the_command(team, capsys):
    text = printed([], capsys)
    assert text.startswith("# lightning-unlearn partition --config run.yaml --model team.Net --data team.Data ")
    (team / "run.yaml").write_text(text)
    assert parsed("run.yaml", capsys, *PLAIN)["model"]["class_path"] == "team.TeamModel"


def test_a_model_that_cannot_be_built_is_described_without_its_layers(team, capsys):
    text = printed(["--model", "team.Broken"], capsys)
    assert "## The layers are not known: Broken() fails with RuntimeError: no weights here" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "TeamModel"], "got 'TeamModel', which has no module in front"),
        (["--model", "teem.TeamModel"], "there is no module 'teem'; run the command in the folder that it lies in"),
        (["--model", "team.TeamModl"], "there is no 'TeamModl' in team; it has TeamModel"),
        (["--model", "package.Net"], "there is no 'Net' in package; write package.model.Net"),
        (
            ["--model", "team.TeamData"],
            "team.TeamData is another class; derive it from lightning.pytorch.LightningModule",
        ),
        (["--data", "team.number"], "team.number is a function"),
        (["--data", "sick.Data"], "importing sick fails: ZeroDivisionError"),
        (
            ["--data", "needing.Data"],
            "importing needing fails: No module named 'nosuch_package'; install what it needs",
        ),
        (["--model", "other.Net"], "it is one of pytorch_lightning, and this command runs lightning.pytorch"),
    ],
)
def test_a_class_that_will_not_do_is_told_in_a_sentence(arguments, message, team):
    (team / "sick.py").write_text("1 / 0")
    (team / "package").mkdir()
    (team / "package" / "__init__.py").write_text("")
    (team / "package" / "model.py").write_text("import gone\n\n\nclass Net(gone.Net): ...\n")
    (team / "needing.py").write_text("import nosuch_package")
    (team / "other.py").write_text(
        "class LightningModule: __module__ = 'pytorch_lightning.core.module'\nclass Net(LightningModule): pass"
    )
    with pytest.raises(SystemExit, match=f"lightning-unlearn init: error: .*{message}"):
        main(["init", *arguments])
