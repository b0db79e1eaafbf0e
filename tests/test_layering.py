"""Imports point one way, folder by folder, as the table of docs/contributing.md says; and none runs in a circle."""

import ast
from pathlib import Path

import pytest

PACKAGE = "lightning_unlearn"
ROOT = Path(__file__).parents[1] / PACKAGE
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

# What the files of a folder may import of ours, beside each other; a file belongs to the longest prefix of its name.
BELOW_TRAINER = {"utilities", "functional", "data", "results", "attribution"}
STEPS = {"evidence", "partitioning", "pruning", "finetuning"}
BELOW_CALLBACKS = BELOW_TRAINER | {"recipes", "trainer", "shrinking"} | STEPS
MAY_IMPORT = {
    "utilities": set(),
    "functional": {"utilities"},
    "data": {"utilities"},
    "results": {"data.fingerprint", "utilities"},
    "attribution": {"functional", "utilities"},
    "recipes": {"functional", "utilities"},
    "noise": {"utilities"},
    "report": {"data.batch", "results", "utilities"},
    "trainer": BELOW_TRAINER,
    "evidence": BELOW_TRAINER | {"trainer", "recipes.classes", "recipes.evidence", "recipes.base"},
    "partitioning": BELOW_TRAINER | {"trainer", "evidence", "recipes"},
    "pruning": BELOW_TRAINER | {"trainer", "shrinking"},
    "finetuning": BELOW_TRAINER | {"trainer"},
    "shrinking": {"pruning.masking", "utilities"},
    "callbacks": BELOW_CALLBACKS,
    "callbacks.report": BELOW_CALLBACKS | {"callbacks", "report"},
}
# They know each other by protocol.
CALLBACKS = [f"callbacks.{name}" for name in ("partition", "prune", "finetune", "report")]
# Who may know a package of others.
MAY_KNOW = {
    "captum": {"attribution.captum_layers"},
    "lightning": {"trainer", "callbacks", "cli", "demo"},
    "pytorch_lightning": set(),
    "torch_pruning": {"shrinking.cut"},
    # By name, when they are called.
    "pandas": set(),
    "cleanlab": set(),
    "datasets": set(),
    "fiftyone": set(),
}


def is_within(name, room):
    return name == room or name.startswith(f"{room}.")


def name_of(file):
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(tree):
    """Dotted names of all imports in a module, also those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Both the module and the name, which may be a module too.
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def violations(file, source):
    """What a file of the package imports and must not."""
    name = name_of(file)
    room = max((room for room in MAY_IMPORT if is_within(name, room)), key=len, default=None)
    for module in imported(ast.parse(source)):
        top, _, rest = module.partition(".")
        if top == "":
            yield f"{file} imports {module}, which is relative"
        if top in MAY_KNOW and not any(is_within(name, knower) for knower in MAY_KNOW[top]):
            yield f"{file} imports {module}, but only {sorted(MAY_KNOW[top])} may know {top}"
        if top != PACKAGE:
            continue
        if room is not None and not any(is_within(rest, other) for other in {room, *MAY_IMPORT[room]}):
            yield f"{file} imports {module}, but {room} may import {sorted(MAY_IMPORT[room])}"
        elif name in CALLBACKS and any(other != name and is_within(rest, other) for other in CALLBACKS):
            yield f"{file} imports {module}, but the callbacks know each other by protocol"


def test_imports_point_one_way():
    found = [line for file in FILES for line in violations(file, (ROOT / file).read_text(encoding="utf-8"))]
    assert not found


# What a step asks the context for, and takes from nobody.
LIGHTNINGS_OBJECTS = {"trainer", "pl_module", "strategy", "lightning_module", "fit_loop"}


def lightnings_objects(source):
    """Where a step takes hold of an object of Lightning's."""
    for node in ast.walk(ast.parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else node.arg if isinstance(node, ast.arg) else None
        if name in LIGHTNINGS_OBJECTS:
            yield f"line {node.lineno}: {name}"


def test_steps_ask_the_context():
    steps = [file for file in FILES if file.partition("/")[0] in STEPS]
    found = {file: list(lightnings_objects((ROOT / file).read_text(encoding="utf-8"))) for file in steps}
    assert len(found) > 50
    assert not {file: lines for file, lines in found.items() if lines}


@pytest.mark.parametrize("source", ["fit.trainer.optimizers", "def f(pl_module): ...", "def f(*, trainer=None): ..."])
def test_a_step_that_takes_hold_of_the_trainer_is_found(source):
    assert len(list(lightnings_objects(source))) == 1


def test_every_room_is_there_and_has_a_rule():
    for file in FILES:
        if file != "__init__.py" and not file.startswith(("cli/", "demo/")):
            assert any(is_within(name_of(file), room) for room in MAY_IMPORT), f"{file} is in no room of the table"
    for room in MAY_IMPORT:
        path = room.replace(".", "/")
        assert f"{path}.py" in FILES or f"{path}/__init__.py" in FILES


def running_imports(file):
    """Modules of ours that a module imports when it runs, so not those for annotations alone."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    modules = {name_of(other) for other in FILES}
    for name in imported(tree):
        rest = name.removeprefix(f"{PACKAGE}.")
        if rest != name:
            yield from (m for m in (rest, rest.rpartition(".")[0]) if m in modules and m != name_of(file))


def circles(imports):
    """Modules that import each other, directly or through others."""

    def reached(start):
        found, ahead = set(), list(imports[start])
        while ahead:
            module = ahead.pop()
            if module not in found:
                found.add(module)
                ahead += imports.get(module, ())
        return found

    ways = {module: reached(module) for module in imports}
    return sorted(module for module in imports if module in ways[module])


def test_no_imports_run_in_a_circle():
    assert circles({name_of(file): set(running_imports(file)) for file in FILES if file != "__init__.py"}) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("results/partition.py", "from lightning_unlearn.functional import mixture"),
        ("results/partition.py", "import lightning_unlearn"),
        ("results/table.py", "from lightning_unlearn.data.loaders import shard_indices"),
        ("functional/mixture.py", "from lightning_unlearn.callbacks.prune import SensitivityPruneCallback"),
        ("functional/mixture.py", "from lightning_unlearn import data"),
        ("functional/new.py", "def later():\n    import lightning_unlearn.attribution"),
        ("utilities/distributed.py", "from lightning_unlearn.functional.mixture import fit_mixture"),
        ("data/loaders.py", "from lightning_unlearn.results.partition import Partition"),
        ("recipes/builtin.py", "from lightning_unlearn.data.loaders import shard_indices"),
        ("evidence/training_dynamics.py", "from lightning_unlearn.recipes import RecipeResult"),
        ("recipes/builtin.py", "from lightning_unlearn.evidence.training_dynamics import TrainingDynamics"),
        ("trainer/protocols.py", "from lightning_unlearn.callbacks.base import UnlearnCallback"),
        ("pruning/guard.py", "from lightning_unlearn.finetuning.relabel import with_labels"),
        ("data/loaders.py", "import lightning.pytorch as pl"),
        ("data/loaders.py", "from captum.attr import LayerGradientXActivation"),
        ("callbacks/prune.py", "import captum"),
        ("attribution/attributor.py", "import captum"),
        ("attribution/oom.py", "from lightning_unlearn.data.loaders import shard_indices"),
        ("callbacks/prune.py", "from lightning_unlearn.callbacks.partition import AttributionPartitionCallback"),
        ("callbacks/finetune.py", "from lightning_unlearn.demo import run"),
        ("callbacks/finetune.py", "from lightning_unlearn import cli"),
        ("callbacks/finetune.py", "from lightning_unlearn.report import write_report"),
        ("callbacks/finetune.py", "from pytorch_lightning import Trainer"),
        ("pruning/masking.py", "from .types import NeuronMask"),
        ("pruning/masking.py", "from . import types"),
        ("__init__.py", "import captum"),
        ("pruning/masking.py", "import torch_pruning"),
        ("shrinking/cut.py", "from lightning_unlearn.attribution import neuron_count"),
        ("shrinking/cut.py", "import lightning.pytorch as pl"),
        ("evidence/step_reader.py", "from lightning.pytorch import Trainer"),
        ("pruning/guard.py", "from lightning.pytorch import LightningModule"),
        ("finetuning/schedules.py", "from lightning.pytorch.utilities.types import LRSchedulerConfig"),
    ],
)
def test_a_wrong_import_is_found(file, source):
    assert len(list(violations(file, source))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("functional/mixture.py", "import torch\nfrom lightning_unlearn.utilities.reduce import Reduce"),
        ("callbacks/prune.py", "import lightning\nfrom lightning_unlearn.trainer.context import probe"),
        ("evidence/training_dynamics.py", "from lightning_unlearn.functional.evidence import label_confidence"),
        ("callbacks/partition.py", "from lightning_unlearn.evidence.training_dynamics import TrainingDynamics"),
        ("callbacks/__init__.py", "from lightning_unlearn.callbacks.prune import SensitivityPruneCallback"),
        ("attribution/captum_layers.py", "from captum.attr import LayerGradientXActivation"),
        ("cli/_config.py", "import lightning"),
        ("shrinking/cut.py", "def later():\n    import torch_pruning"),
        ("shrinking/cut.py", "from lightning_unlearn.pruning.masking import neuron_entries"),
        ("data/loaders.py", "import lightning_other"),
    ],
)
def test_a_right_import_is_let_through(file, source):
    assert list(violations(file, source)) == []
