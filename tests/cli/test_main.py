"""Which command runs, how it is helped with, and how it ends."""

import re
import sys
from pathlib import Path

import pytest

import lightning_unlearn
from lightning_unlearn.cli import main
from lightning_unlearn.cli._errors import exit_with_message
from lightning_unlearn.cli._main import make_parser

COMMANDS = ("demo", "fit", "init", "partition", "report", "show", "shrink")


def ended(arguments, capsys):
    """The status that a command ends the process with, and what it has printed on both streams."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    printed = capsys.readouterr()
    return exit_info.value.code, printed.out, printed.err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_examples_that_can_be_read(command, capsys):
    code, out, _ = ended([command, "--help"], capsys)
    assert code == 0
    assert out.startswith(f"usage: lightning-unlearn {command} ")
    assert "%%" not in out
    lines = re.findall(r"^  (lightning-unlearn .+)$", out.partition("examples:")[2], re.M)
    assert lines
    for line in lines:
        assert line.split()[1] == command
        for option in re.findall(r"--[\w.]+", line):
            assert option in out.partition("examples:")[0], f"{line} has {option}, which the help does not explain"


def test_the_help_names_every_command_and_so_does_the_command_alone(capsys):
    code, out, _ = ended(["--help"], capsys)
    assert code == 0
    assert sorted(re.findall(r"^    (\w+) ", out, re.M)) == sorted(COMMANDS)
    main([])
    assert capsys.readouterr().out == out


def test_the_version(capsys):
    assert ended(["--version"], capsys)[:2] == (0, f"lightning-unlearn {lightning_unlearn.__version__}\n")


def test_an_unknown_command_names_the_nearest_and_those_there_are(capsys):
    code, _, err = ended(["partitoin"], capsys)
    assert code == 2
    assert "unknown command 'partitoin'; choose from demo, fit, init" in err
    assert err.endswith("Did you mean 'partition'?\n")


def test_every_option_says_its_default():
    (commands,) = (
        action for action in make_parser()._actions if hasattr(action, "choices") and action.dest == "command"
    )
    for name, command in commands.choices.items():
        for action in command._actions:
            if action.option_strings and action.dest != "help":
                assert "(default: " in action.help, f"{name} {action.option_strings}"


@pytest.mark.parametrize(
    ("missing", "arguments", "advice"),
    [
        ("sklearn.datasets", ["demo", "--fast"], "pip install scikit-learn"),
        ("jsonargparse", ["fit", "--config", "x.yaml"], r"pip install 'jsonargparse\[signatures\]'"),
        ("jsonargparse", ["init"], r"pip install 'jsonargparse\[signatures\]'"),
        ("shtab", ["--print-completion", "bash"], "pip install shtab"),
    ],
)
def test_a_missing_package_is_named(missing, arguments, advice, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=advice):
        main(arguments)


def test_a_bug_keeps_its_traceback_and_so_does_a_users_error():
    with pytest.raises(ValueError, match="of a user"), exit_with_message("fit"):
        raise ValueError("of a user")
    with pytest.raises(RuntimeError, match="No partition yet"), exit_with_message("fit"):
        lightning_unlearn.AttributionPartitionCallback(at_epoch=1).partition  # noqa: B018
    with pytest.raises(SystemExit, match=r"^lightning-unlearn fit: error: Expected at_epoch"), exit_with_message("fit"):
        lightning_unlearn.AttributionPartitionCallback(at_epoch=0)


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
    with pytest.raises(SystemExit, match=f"lightning-unlearn demo: error: {message}"):
        main(["demo", "--fast", *arguments])
