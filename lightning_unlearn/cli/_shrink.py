"""``shrink``: the pruned neurons of a checkpoint's model, cut out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor
from typing_extensions import override

from lightning_unlearn.callbacks import AttributionPartitionCallback
from lightning_unlearn.cli._config import CommandParser, ConfigCLI, find_users_classes, named_classes
from lightning_unlearn.cli._examples import examples
from lightning_unlearn.cli._results import read_checkpoint
from lightning_unlearn.data.task_format import TaskFormat
from lightning_unlearn.shrinking import ExampleInput, compare, save_shrunk
from lightning_unlearn.shrinking.cut import shrunk_copy
from lightning_unlearn.utilities.files import target_file

HELP = """\
Cuts the pruned neurons out of a model. Builds model and data from the configuration, loads the checkpoint's weights,
cuts out the silent neurons (as SensitivityPruneCallback leaves them), checks on a training batch that the outputs are
the same, and writes the smaller model. Runs on the CPU and trains nothing."""
_EXAMPLES = examples(
    "lightning-unlearn shrink --config run.yaml --ckpt_path last.ckpt --out small.pt",
    "lightning-unlearn shrink --config run.yaml --ckpt_path last.ckpt --layers '[fc, features.3]'",
)


class _BatchTakenError(Exception):
    """A batch is there, and no step is to be made of it."""


class _TakeBatch(Callback):
    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        raise _BatchTakenError(batch)


class ShrinkCLI(ConfigCLI):
    """Model and data of a configuration, and a Trainer that only holds them."""

    command = "shrink"

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        group = parser.add_argument_group("What to shrink, and where to write it")
        group.add_argument(
            "--ckpt_path", metavar="FILE", type=str | None, help="The checkpoint whose weights are shrunk (required)"
        )
        group.add_argument("--out", metavar="FILE", type=str, default="small.pt", help="The file to write")
        group.add_argument(
            "--layers",
            type=list[str] | None,
            help="Dotted paths of the layers to cut neurons out of; by default all with zeroed neurons",
        )
        group.add_argument(
            "--repeats", metavar="N", type=int, default=30, help="Number of timed calls; the median is reported"
        )
        # Where the configuration is one that fit has saved.
        group.add_argument(
            "--weights_only", type=bool | None, help="Ignored: checkpoints are always loaded without running code"
        )
        return parser

    @override
    def before_instantiate_classes(self) -> None:
        if (path := self.config["ckpt_path"]) is None:
            raise ValueError("Expected a checkpoint to shrink; give --ckpt_path last.ckpt.")
        self.out = target_file(self.config["out"])
        self.checkpoint = read_checkpoint(path)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self.config_init["trainer"].get("callbacks") or []
        given = given if isinstance(given, (list, tuple)) else [given]
        known = [one.task_format for one in given if isinstance(one, AttributionPartitionCallback)]
        self.task_format = known[0] if known else TaskFormat()
        quiet: dict[str, Any] = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        return Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            num_sanity_val_steps=0,
            logger=False,
            callbacks=[_TakeBatch()],
            **quiet,
        )


def run_shrink(arguments: Sequence[str]) -> None:
    """Shrink, compare, write, and say how to load it."""
    find_users_classes()
    arguments, classes = named_classes(arguments)
    cli = ShrinkCLI(
        **classes,
        args=list(arguments),
        run=False,
        save_config_callback=None,
        parser_class=CommandParser,
        parser_kwargs={
            "prog": "lightning-unlearn shrink",
            "usage": "lightning-unlearn shrink --config FILE --ckpt_path FILE [OPTION]...",
            "description": HELP,
            "epilog": _EXAMPLES,
        },
    )
    model = cli.model
    _load_weights(model, cli.checkpoint, cli.config["ckpt_path"])
    x = example_input(cli)
    cut = shrunk_copy(model, x, layers=cli.config["layers"])
    small = cut.model
    if not cut.is_smaller:
        raise ValueError(f"Nothing to shrink in {cli.config['ckpt_path']}, so nothing is written. {cut.note}")
    save_shrunk(small, cli.out)
    print(compare(model, small, x, repeats=cli.config["repeats"]))
    difference, largest = _difference(model, small, x)
    print(f"\nOutputs on a batch of the training data differ by at most {difference:.1e}, of {largest:.3g}.")
    if cut.note:
        print(f"Note: {cut.note}")
    print(f"Written: {cli.out}\n\nTo load it:\n{how_to_load(cli, cli.out)}")


def _load_weights(model: LightningModule, checkpoint: dict[str, Any], path: str) -> None:
    model.configure_model()
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise ValueError(
            f"Expected {path} to hold the weights of the {type(model).__name__} of the configuration, but they do not"
            f" fit: {' '.join(lines)}"
        ) from error


def example_input(cli: ShrinkCLI) -> ExampleInput:
    """Return what ``forward`` takes, of the first training batch, as loaders and transfer hooks leave it in a fit."""
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    except _BatchTakenError as taken:
        x, _ = cli.task_format.split(taken.args[0])
        known: ExampleInput = x
        return known
    raise ValueError("Expected a training batch to check the outputs on, but the loader has none.")


def _difference(model: LightningModule, small: LightningModule, x: ExampleInput) -> tuple[float, float]:
    outputs = []
    for net in (model, small):
        net.eval()
        with torch.no_grad():
            outputs.append(_first(net(x) if isinstance(x, Tensor) else net(**x) if isinstance(x, dict) else net(*x)))
    return float((outputs[0] - outputs[1]).abs().max()), float(outputs[0].abs().max())


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def how_to_load(cli: ShrinkCLI, out: Path) -> str:
    """Return the lines of Python that load it."""
    kind = type(cli.model)
    settings = cli.config["model"]
    init = (settings.get("init_args") or {}) if "class_path" in settings else settings
    arguments = ", ".join(f"{name}={value!r}" for name, value in dict(init).items())
    return (
        f"    from {kind.__module__} import {kind.__qualname__}\n"
        "    from lightning_unlearn.shrinking import load_shrunk\n"
        f"    model = load_shrunk({kind.__qualname__}({arguments}), {str(out)!r})"
    )
