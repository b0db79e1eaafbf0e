"""``init``: the YAML that it prints is one that fit takes."""

import inspect
import re

import pytest
import yaml

import lightning_unlearn
from lightning_unlearn.cli import main
from lightning_unlearn.cli._options import FINETUNE, PARTITION, PRUNE, REPORT

DEMO = ["--model", "lightning_unlearn.demo.DigitsClassifier", "--data", "lightning_unlearn.demo.DigitsDataModule"]
TEAM = ["--model", "team.Needy", "--data", "team.TeamData"]
OPTIONS = {
    "AttributionPartitionCallback": PARTITION,
    "SensitivityPruneCallback": PRUNE,
    "CleanSubsetFinetuneCallback": FINETUNE,
    "UnlearnReport": REPORT,
}


def printed(arguments, capsys):
    main(["init", *arguments])
    return capsys.readouterr().out


def parsed(file, capsys, *arguments):
    """What ``fit`` would run."""
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", file, *arguments, "--print_config"])
    assert exit_info.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_of_the_demo_it_says_what_there_is_and_fit_takes_it(team, capsys):
    text = printed(DEMO, capsys)
    assert "    # lr: 0.001  # float: learning rate of Adam." in text
    assert "    # noise: 0.4  # float: share of the training labels that are wrong" in text
    assert "## Layers, with their neurons: features.0 (32), features.3 (64), fc (128), head: the head" in text
    assert "        # layer: fc  # Linear or convolution to prune" in text
    (team / "run.yaml").write_text(text)
    config = parsed("run.yaml", capsys)
    assert [one["class_path"].split(".")[-1] for one in config["trainer"]["callbacks"]] == list(OPTIONS)


def test_every_line_that_is_uncommented_is_a_default_that_fit_takes(team, capsys):
    text = printed(["--model", "team.TeamModel", "--data", "team.TeamData"], capsys)
    (team / "all.yaml").write_text(re.sub(r"^( +)# (?=[\w]+:)", r"\1", text, flags=re.M))
    (team / "some.yaml").write_text(text)
    everything, some = parsed("all.yaml", capsys), parsed("some.yaml", capsys)
    prune = everything["trainer"]["callbacks"][1]["init_args"]
    assert prune.pop("layer") == "encoder.0"
    some["trainer"]["callbacks"][1]["init_args"].pop("layer")
    assert everything == some


@pytest.mark.parametrize("name", OPTIONS)
def test_what_stands_as_a_default_is_the_callbacks_own(name):
    parameters = inspect.signature(getattr(lightning_unlearn, name).__init__).parameters
    for one in OPTIONS[name]:
        if not one.is_set:
            assert parameters[one.name].default == one.value, one.name


def test_every_option_of_a_partition_that_a_user_sets_stands_there():
    # What is for experiments with the method stands in its docstring alone.
    left_out = {"self", "stable_share", "evidence_every_n_epochs", "method", "check_data"}
    parameters = inspect.signature(lightning_unlearn.AttributionPartitionCallback.__init__).parameters
    assert set(parameters) - left_out == {one.name for one in PARTITION}


def test_what_has_no_default_is_a_placeholder_of_which_fit_tells(team, capsys):
    main(["init", *TEAM, "--out", "needy.yaml"])
    assert capsys.readouterr().out == "Written: needy.yaml\n"
    text = (team / "needy.yaml").read_text()
    assert "    width: '<fill in: int>'  # needed; int" in text
    assert "    # rates: [1.0e-05, 0.5]  # tuple[float, ...]" in text
    assert "the default is ReLU()" in text
    for command in ("fit", "partition"):
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--config", "needy.yaml"])
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.startswith(
            f"lightning-unlearn {command}: error: needy.yaml has values that only you know: model.init_args.width"
            " (<fill in: int>), model.init_args.name (<fill in: str>); replace them."
        )
    (team / "needy.yaml").write_text(text.replace("'<fill in: int>'", "16").replace("'<fill in: str>'", "net"))
    assert parsed("needy.yaml", capsys)["model"]["init_args"]["width"] == 16
    with pytest.raises(SystemExit, match=r"Expected a new file, but needy.yaml exists"):
        main(["init", *TEAM, "--out", "needy.yaml"])


def test_without_classes_these_are_placeholders(team, capsys):
    content = yaml.safe_load(printed([], capsys))
    assert content["model"] == {"class_path": "<fill in: your LightningModule, as team.Net>"}


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
    with pytest.raises(SystemExit, match=f"lightning-unlearn init: .*{message}"):
        main(["init", *arguments])
