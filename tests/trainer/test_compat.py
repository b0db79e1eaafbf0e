"""Users of pytorch_lightning, and users of lightning.pytorch who have it beside."""

import ast
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException as LightningsException
from torch import nn

from lightning_unlearn.trainer.compat import MisconfigurationException, has_forward, is_lightning_instance
from tests.ranks import run_python
from tests.toys import Plain, Toy, make_trainer

ROOT = Path(__file__).parents[2]
CALLBACKS = ROOT / "lightning_unlearn" / "callbacks"
SCRIPT = Path(__file__).with_name("pytorch_lightning_script.py")


# Not imported in this process, where Lightning's log lines would then go to another logger.
pytestmark = pytest.mark.skipif(find_spec("pytorch_lightning") is None, reason="pytorch_lightning is not installed")


def python(*arguments, cwd):
    done = run_python(cwd, *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    folder = tmp_path_factory.mktemp("team")
    python(SCRIPT, "found.json", cwd=folder)
    return json.loads((folder / "found.json").read_text())


def test_a_fit_of_pytorch_lightning(team):
    fit = team["fit"]
    assert fit["found"] > 0.9
    assert fit["false alarms"] < 0.1
    assert len(fit["pruned"]) == 8
    assert fit["zero"] == 0
    assert fit["accuracy"] > 0.9
    assert "Validation accuracy" in fit["advice"]
    assert fit["lr"] == [pytest.approx(1e-2 * 0.1**3)]  # three epochs of the schedule that was given
    assert fit["before_bar"] == [
        "CleanSubsetFinetuneCallback",
        "AttributionPartitionCallback",
        "SensitivityPruneCallback",
    ]


def test_its_log_has_our_lines(team):
    for line in (
        "Partition after 5 epochs",
        "Pruned 8 of 32 neurons",
        "Fine-tuning from epoch 5",
        "`Trainer.fit` stopped",
    ):
        assert line in team["fit"]["log"]


def test_a_fit_of_pytorch_lightning_is_resumed(team):
    assert team["fit"]["resumed partition"]
    assert team["fit"]["resumed weights"] == 0


def test_its_lightning_cli_takes_our_callbacks(team):
    assert team["cli"]["found"] > 0.9
    assert team["cli"]["pruned"] == 4


def test_who_catches_its_exception_catches_ours(team):
    assert "needs an AttributionPartitionCallback" in team["refused"]["no partner"]
    assert "to have a forward that returns logits, but it has none" in team["refused"]["no forward"]


def test_our_callbacks_are_of_both_packages_whichever_was_imported_first(team):
    assert team["kinds"]["theirs"] == [True] * 4
    assert team["kinds"]["lightning's"] == [True] * 4
    assert team["kinds"]["signature"] == ["layer"]


def test_a_package_is_imported_only_when_it_is_needed(team):
    assert not team["lightning was imported early"]
    assert team["pytorch_lightning was not imported by us"]
    assert team["names"] == []


def test_the_log_lines_of_pytorch_lightning_stay_in_its_own_logger(tmp_path):
    code = """
import pytorch_lightning as pl
from lightning_utilities.core import rank_zero
before = rank_zero.log
import lightning_unlearn
assert callable(lightning_unlearn.recipes.get_recipe) and not hasattr(lightning_unlearn, "no_such_room")
from lightning_unlearn import AttributionPartitionCallback
print(before.name, rank_zero.log is before, issubclass(AttributionPartitionCallback, pl.Callback))
"""
    assert python("-c", code, cwd=tmp_path).split() == ["pytorch_lightning.utilities.rank_zero", "True", "True"]


class Ours(L.LightningModule):
    pass


class Theirs(nn.Module):
    pass


Theirs.__module__ = "pytorch_lightning.core.module"


@pytest.mark.parametrize(
    ("made", "names", "expected"),
    [
        (SingleDeviceStrategy, ("SingleDeviceStrategy", "DDPStrategy"), True),
        (DDPStrategy, ("DDPStrategy",), True),
        (FSDPStrategy, ("SingleDeviceStrategy", "DDPStrategy"), False),
        (TQDMProgressBar, ("ProgressBar",), True),
        (type("Mine", (DDPStrategy,), {}), ("DDPStrategy",), True),
        (type("DDPStrategy", (), {}), ("DDPStrategy",), False),
        (type("Mine", (Theirs,), {}), ("Theirs",), True),
        (lambda: None, ("NoneType",), False),
    ],
)
def test_classes_of_lightning_are_known_by_name(made, names, expected):
    assert is_lightning_instance(made(), *names) is expected


def test_a_forward_of_ones_own_is_told_from_lightnings():
    assert has_forward(Toy())
    assert not has_forward(Plain())
    assert not has_forward(Ours())
    assert not has_forward(type("Mine", (Theirs,), {})())


def test_the_other_package_is_not_imported_where_the_tests_run():
    assert "pytorch_lightning" not in sys.modules


def test_our_exception_is_lightnings():
    with pytest.raises(LightningsException, match="why"):
        raise MisconfigurationException("why")


def lightnings_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
            yield from (alias.asname or alias.name for alias in node.names)


def depends_on_package(source):
    """Lines that ask whether something is of a class of lightning.pytorch, or catch its exception, or raise it."""
    tree = ast.parse(source)
    theirs = set(lightnings_names(tree))
    for node in ast.walk(tree):
        asked = []
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            asked = node.args[1:]
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            asked = [node.type]
        elif isinstance(node, ast.Raise) and node.exc is not None:
            asked = [node.exc]
        elif isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        for part in asked:
            if {name.id for name in ast.walk(part) if isinstance(name, ast.Name)} & theirs:
                yield node.lineno


@pytest.mark.parametrize(
    "path", sorted((ROOT / "lightning_unlearn" / "callbacks").glob("*.py")), ids=lambda path: path.name
)
def test_nothing_depends_on_classes_of_one_package(path):
    lines = list(depends_on_package(path.read_text(encoding="utf-8")))
    assert not lines, f"{path.name}, lines {lines}: use trainer/compat.py, since the Trainer may be pytorch_lightning's"


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(x, DDPStrategy)",
        "isinstance(x, (int, DDPStrategy))",
        "type(x) is DDPStrategy",
        "type(x).forward is DDPStrategy.forward",
        "raise DDPStrategy('why')",
        "try: pass\nexcept DDPStrategy: pass",
    ],
)
def test_a_dependence_on_classes_of_one_package_is_found(line):
    assert list(depends_on_package(f"from lightning.pytorch.strategies import DDPStrategy\n{line}"))


def test_the_toys_trainer_is_lightnings():
    assert is_lightning_instance(make_trainer(), "Trainer")
