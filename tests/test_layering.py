"""Imports point one way, room by room, as CONTRIBUTING.md asks."""

import ast
from pathlib import Path

import pytest

PACKAGE = "lightning_unlearn"
ROOT = Path(__file__).parents[1] / PACKAGE
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

# What a file may import of ours, by prefix; a file belongs to the longest prefix of its own name.
MATH = {"arguments", "types", "functional", "sharding"}
ALL_BELOW = MATH | {
    "attributes",
    "recipes",
    "finite",
    "trajectory",
    "capture",
    "batches",
    "data",
    "targets",
    "review",
    "drawing",
    "sampling",
    "pruning",
    "distributed",
    "fingerprint",
    "rows",
    "finding",
    "finetuning",
}
SHARED = {
    "callbacks._copies",
    "callbacks._diverged",
    "callbacks._neighbours",
    "callbacks._packages",
    "callbacks._provenance",
    "callbacks._rows",
    "callbacks._base",
    "callbacks._layouts",
    "callbacks._lightning",
    "callbacks._loggers",
    "callbacks._progress",
    "callbacks._saying",
    "callbacks._scoring",
    "callbacks._strategies",
    "callbacks._training_pass",
    "callbacks._sample_rows",
    "callbacks._validation",
}
PARTITIONING = {
    "callbacks._assembly",
    "callbacks._early_epochs",
    "callbacks._early_stopping",
    "callbacks._evidence_pass",
    "callbacks._frozen_features",
    "callbacks._judging",
    "callbacks._label_watch",
    "callbacks._partition_log",
    "callbacks._partition_settings",
    "callbacks._recognise",
    "callbacks._resuming",
    "callbacks._reviewing",
    "callbacks._summary",
    "callbacks._validation_partition",
    "callbacks._validation_watch",
    "callbacks._when",
}
PRUNING = {
    "callbacks._criteria",
    "callbacks._guard",
    "callbacks._holding",
}
MAY_IMPORT = {
    "arguments": set(),
    "storage": {"arguments"},
    "types": {"arguments", "storage", "fingerprint", "plots"},  # the last when it is asked to draw
    "review": {"arguments", "types", "storage", "fingerprint"},
    "plots": {"arguments", "types"},
    "finding": {"types"},
    "exports": {"arguments", "types", "storage"},
    "sharding": set(),
    "functional": MATH,
    "recipes": MATH | {"recipes"},
    "finite": MATH | {"recipes"},
    "trajectory": MATH,
    "capture": MATH | {"capture"},
    "attributes": set(),
    "data": MATH | {"attributes"},
    "batches": set(),
    "targets": {"arguments", "batches"},
    "drawing": set(),
    "sampling": MATH | {"data", "drawing"},
    "pruning": MATH | {"capture", "pruning"},
    "finetuning": MATH | {"capture", "finetuning"},
    "distributed": MATH,
    "noise": {"arguments", "noise", "storage"},
    "fingerprint": {"attributes"},
    "rows": {"batches", "fingerprint"},
    "shrinking": {"arguments", "pruning.masking", "shrinking", "storage"},
    "callbacks._packages": set(),
    "callbacks._provenance": {"arguments", "types", "review", "storage"},
    "callbacks._saying": set(),
    "callbacks._progress": {"callbacks._packages", "callbacks._saying"},
    "callbacks._kept": {"sharding"},
    "callbacks._lightning": ALL_BELOW | {"callbacks._kept", "callbacks._packages", "callbacks._progress"},
    "callbacks._head_watch": {"capture"},
    "callbacks._training_pass": ALL_BELOW | {"callbacks._head_watch", "callbacks._lightning"},
    "callbacks._strategies": {"callbacks._lightning", "callbacks._packages"},
    "callbacks._scoring": {"data", "callbacks._packages"},
    "callbacks._layouts": ALL_BELOW,
    "callbacks._base": ALL_BELOW
    | {
        "callbacks._layouts",
        "callbacks._lightning",
        "callbacks._neighbours",
        "callbacks._packages",
        "callbacks._provenance",
        "callbacks._progress",
        "callbacks._rows",
        "callbacks._scoring",
        "callbacks._strategies",
    },
    "callbacks._validation": ALL_BELOW
    | {
        "callbacks._base",
        "callbacks._lightning",
        "callbacks._progress",
        "callbacks._saying",
        "callbacks._scoring",
        "callbacks._strategies",
    },
    "callbacks._sample_rows": ALL_BELOW | {"callbacks._base", "callbacks._lightning", "callbacks._scoring"},
    "callbacks._summary": {"types", "finding", "callbacks._diverged"},
    "callbacks._diverged": {"sharding"},
    "callbacks._neighbours": {"callbacks._lightning", "callbacks._packages"},
    "callbacks._resuming": {"types"},
    "callbacks._optimizers": {"callbacks._packages"},
    "callbacks._loggers": {"types", "plots", "callbacks._lightning", "callbacks._packages"},
    "callbacks._assembly": MATH | {"recipes", "distributed", "review", "callbacks._finding"},
    "callbacks._finding": {"recipes", "finding"},
    "callbacks._early_epochs": ALL_BELOW,
    "callbacks._early_stopping": {"callbacks._lightning", "callbacks._packages", "callbacks._saying"},
    "callbacks._validation_watch": ALL_BELOW,
    "callbacks._when": ALL_BELOW | {"callbacks._lightning", "callbacks._packages"},
    "callbacks._reviewing": ALL_BELOW | {"callbacks._base", "callbacks._lightning", "callbacks._scoring"},
    "callbacks._companions": {"batches", "targets"},
    "callbacks._relabel": ALL_BELOW
    | {
        "callbacks._base",
        "callbacks._companions",
        "callbacks._head_watch",
        "callbacks._lightning",
        "callbacks._rows",
        "callbacks._scoring",
    },
    "callbacks._partition_settings": ALL_BELOW | SHARED,
    "callbacks._partition_log": ALL_BELOW | SHARED | {"callbacks._summary", "callbacks._loggers"},
    "callbacks._rows": ALL_BELOW | {"callbacks._lightning", "callbacks._scoring"},
    "callbacks._recognise": ALL_BELOW | SHARED,
    "callbacks._frozen_features": ALL_BELOW | SHARED,
    "callbacks._evidence_pass": ALL_BELOW | SHARED | {"callbacks._frozen_features", "callbacks._recognise"},
    "callbacks._label_watch": ALL_BELOW | {"callbacks._head_watch"},
    "callbacks._judging": ALL_BELOW | SHARED | {"callbacks._assembly"},
    "callbacks._validation_partition": ALL_BELOW
    | SHARED
    | {"callbacks._assembly", "callbacks._early_epochs", "callbacks._evidence_pass", "callbacks._judging"},
    "callbacks.partition": ALL_BELOW | SHARED | PARTITIONING,
    "callbacks._copies": ALL_BELOW | {"callbacks._lightning", "callbacks._packages"},
    "callbacks._holding": ALL_BELOW | {"callbacks._copies"},
    "callbacks._criteria": ALL_BELOW | SHARED | {"pruning"},
    "callbacks._guard": ALL_BELOW | SHARED | {"pruning"},
    "callbacks.prune": ALL_BELOW | SHARED | PRUNING,
    "callbacks.finetune": ALL_BELOW | SHARED | {"callbacks._optimizers", "callbacks._relabel"},
    "callbacks.report": ALL_BELOW | SHARED | {"report"},
    "callbacks": ALL_BELOW | {"callbacks"},
    "report": {"arguments", "types", "storage", "batches", "finding", "targets", "report"},
}
# Who may know a package of others.
MAY_KNOW = {
    "captum": {"capture.methods"},
    "lightning": {"callbacks", "cli", "demo"},
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


def imported(source):
    """Dotted names of all imports in a module, also those within functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Both the module and the name, which may be a module too.
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def violations(file, source):
    """What a file of the package imports and must not."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    room = max((room for room in MAY_IMPORT if is_within(name, room)), key=len, default=None)
    for module in imported(source):
        top, _, rest = module.partition(".")
        if top == "":
            yield f"{file} imports {module}, which is relative"
        if top in MAY_KNOW and not any(is_within(name, knower) for knower in MAY_KNOW[top]):
            yield f"{file} imports {module}, but only {sorted(MAY_KNOW[top])} may know {top}"
        if top == PACKAGE and room is not None and not any(is_within(rest, other) for other in MAY_IMPORT[room]):
            yield f"{file} imports {module}, but {room} may import {sorted(MAY_IMPORT[room])}"


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    assert list(violations(file, (ROOT / file).read_text(encoding="utf-8"))) == []


def test_every_room_is_there_and_has_a_rule():
    without_rule = {"__init__.py"}
    for file in FILES:
        name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if file not in without_rule and not file.startswith(("cli/", "demo/")):
            assert any(is_within(name, room) for room in MAY_IMPORT), f"{file} is in no room of the table"
    for room in MAY_IMPORT:
        path = room.replace(".", "/")
        assert f"{path}.py" in FILES or f"{path}/__init__.py" in FILES


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("types.py", "from lightning_unlearn.functional import mixture"),
        ("types.py", "import lightning_unlearn"),
        ("functional/mixture.py", "from lightning_unlearn.callbacks.prune import SensitivityPruneCallback"),
        ("functional/mixture.py", "from lightning_unlearn import data"),
        ("functional/new.py", "def later():\n    import lightning_unlearn.capture"),
        ("recipes/judges.py", "from lightning_unlearn.data import rank_share"),
        ("trajectory.py", "from lightning_unlearn.recipes import Verdict"),
        ("trajectory.py", "from lightning_unlearn.distributed import sum_over_ranks"),
        ("recipes/judges.py", "from lightning_unlearn.trajectory import Trajectory"),
        ("callbacks/_training_pass.py", "from lightning_unlearn.callbacks._base import probe"),
        ("data.py", "import lightning.pytorch as pl"),
        ("data.py", "from captum.attr import LayerGradientXActivation"),
        ("callbacks/prune.py", "import captum"),
        ("capture/attributor.py", "import captum"),
        ("capture/memory.py", "from lightning_unlearn.data import rank_share"),
        ("callbacks/prune.py", "from lightning_unlearn.callbacks.partition import AttributionPartitionCallback"),
        ("callbacks/prune.py", "from lightning_unlearn.callbacks import AttributionPartitionCallback"),
        ("callbacks/_lightning.py", "from lightning_unlearn.callbacks._base import UnlearnCallback"),
        ("callbacks/finetune.py", "from lightning_unlearn.demo import run"),
        ("callbacks/finetune.py", "from lightning_unlearn import cli"),
        ("callbacks/finetune.py", "from pytorch_lightning import Trainer"),
        ("pruning/masking.py", "from .types import NeuronMask"),
        ("pruning/masking.py", "from . import types"),
        ("__init__.py", "import captum"),
        ("pruning/masking.py", "import torch_pruning"),
        ("shrinking/cut.py", "from lightning_unlearn.capture import neuron_count"),
        ("shrinking/cut.py", "import lightning.pytorch as pl"),
    ],
)
def test_a_wrong_import_is_found(file, source):
    assert len(list(violations(file, source))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("functional/mixture.py", "import torch\nfrom lightning_unlearn.types import Evidence"),
        ("callbacks/prune.py", "import lightning\nfrom lightning_unlearn.callbacks._base import probe"),
        ("trajectory.py", "from lightning_unlearn.functional.evidence import label_support"),
        ("callbacks/partition.py", "from lightning_unlearn.callbacks._training_pass import TrainingPass"),
        ("callbacks/partition.py", "from lightning_unlearn.trajectory import Trajectory"),
        ("callbacks/__init__.py", "from lightning_unlearn.callbacks.prune import SensitivityPruneCallback"),
        ("capture/methods.py", "from captum.attr import LayerGradientXActivation"),
        ("cli/_config.py", "import lightning"),
        ("shrinking/cut.py", "def later():\n    import torch_pruning"),
        ("shrinking/cut.py", "from lightning_unlearn.pruning.masking import neuron_entries"),
        ("data.py", "import lightning_other"),
    ],
)
def test_a_right_import_is_let_through(file, source):
    assert list(violations(file, source)) == []
