"""``init``: a commented YAML for a user's model and data."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with Lightning, its types do not

from lightning_unlearn.cli._examples import add_command
from lightning_unlearn.cli._options import FINETUNE, PARTITION, PRUNE, REPORT, Option
from lightning_unlearn.utilities.files import replacing

_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def add_init(commands: Any) -> None:
    """Adds ``init``."""
    init = add_command(
        commands,
        "init",
        "print a commented YAML for your model and data",
        """\
Prints a YAML for lightning-unlearn fit and partition: your classes with their arguments, types and defaults, the
Trainer, and the callbacks with each option in a line. What has no default stands as <fill in: type>, and fit says so
until it is replaced. Where the model can be built without arguments, its layers are listed.""",
        "lightning-unlearn init --model team.Net --data team.Data --out run.yaml",
        "lightning-unlearn init --model lightning_unlearn.demo.DigitsClassifier --data"
        " lightning_unlearn.demo.DigitsDataModule",
    )
    init.add_argument(
        "--model", metavar="CLASS", help="dotted path of your LightningModule (default: a placeholder for it)"
    )
    init.add_argument(
        "--data", metavar="CLASS", help="dotted path of your LightningDataModule (default: a placeholder for it)"
    )
    init.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: standard output)")


def run_init(options: argparse.Namespace) -> None:
    """Prints or writes the YAML."""
    from lightning_unlearn.cli._classes import data_class, layer_notes, model_class
    from lightning_unlearn.cli._config import find_users_classes, placeholder

    find_users_classes()
    model = None if options.model is None else model_class(options.model)
    data = None if options.data is None else data_class(options.data)
    if options.out is not None and options.out.expanduser().exists():
        raise ValueError(f"Expected a new file, but {options.out} exists; give another --out, or remove it.")
    layers, near_head = ([], None) if model is None else layer_notes(model)
    lines = [
        f"# lightning-unlearn fit --config {options.out or 'run.yaml'}",
        f"# lightning-unlearn partition --config {options.out or 'run.yaml'}   # only says which samples are wrong",
        "# A line such as '# name: value' shows a default: take the '# ' in front away to change it,",
        "# and that of the init_args above it.",
        "seed_everything: 0",
        *_class("model", options.model or placeholder("your LightningModule, as team.Net"), model),
        *_class("data", options.data or placeholder("your LightningDataModule, as team.Data"), data),
        "trainer:",
        "  max_epochs: 30  # on all the data until the partition, then on the clean subset",
        "  # accelerator: auto  # cpu, gpu, mps",
        "  # devices: auto  # how many; DDP and FSDP2 work",
        "  callbacks:",
    ]
    for name, entries in _callbacks(near_head):
        lines += _callback(name, entries, layers)
    text = "\n".join(lines) + "\n"
    if options.out is None:
        print(text, end="")
        return
    with replacing(options.out) as file:
        file.write(text.encode())
    print(f"Written: {options.out}")


def _callbacks(near_head: str | None) -> Iterator[tuple[str, Sequence[Option]]]:
    yield "AttributionPartitionCallback", PARTITION
    prune = PRUNE
    if near_head is not None:
        prune = [one._replace(value=near_head) if one.name == "layer" else one for one in PRUNE]
    yield "SensitivityPruneCallback", prune
    yield "CleanSubsetFinetuneCallback", FINETUNE
    yield "UnlearnReport", REPORT


def _callback(name: str, options: Sequence[Option], layers: Sequence[str]) -> Iterator[str]:
    yield f"    - class_path: lightning_unlearn.{name}"
    is_set = any(one.is_set for one in options)
    yield f"      {'' if is_set else '# '}init_args:"
    for one in options:
        if one.name == "layer":
            yield from (f"        ## {line}" for line in layers)
        mark = "" if one.is_set else "# "
        yield f"        {mark}{one.name}: {_value(one.value)}  # {one.what}"


def _class(key: str, path: str, kind: type[Any] | None) -> Iterator[str]:
    yield f"{key}:"
    yield f"  class_path: {_value(path)}"
    arguments = [] if kind is None else list(_arguments(kind))
    if arguments:
        yield f"  {'# ' if all(line.startswith('#') for line in arguments) else ''}init_args:"
        yield from (f"    {line}" for line in arguments)


def _arguments(kind: type[Any]) -> Iterator[str]:
    from lightning_unlearn.cli._config import placeholder

    documented = _documented(kind)
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        has_type = parameter.annotation is not parameter.empty
        type_name = inspect.formatannotation(parameter.annotation).strip("'") if has_type else "any type"
        what = ": ".join(filter(None, (type_name, documented.get(name))))
        if parameter.default is parameter.empty:
            yield f"{name}: {_value(placeholder(type_name))}  # needed; {what}"
        elif isinstance(parameter.default, _PLAIN):
            yield f"# {name}: {_value(parameter.default)}  # {what}"
        else:
            yield f"# {name}: {_value(placeholder(type_name))}  # {what}; the default is {parameter.default!r}"


def _documented(kind: type[Any]) -> dict[str, str]:
    """What docstrings say of each argument, in a line."""
    import docstring_parser

    found: dict[str, str] = {}
    for text in (kind.__doc__, kind.__init__.__doc__):
        try:
            parameters = docstring_parser.parse(text or "").params
        except docstring_parser.ParseError:
            continue
        found |= {one.arg_name: " ".join(one.description.split()) for one in parameters if one.description}
    return found


def _value(value: Any) -> str:
    """A value as it stands in a line of YAML."""
    if isinstance(value, float) and not math.isfinite(value):
        # Without the dot in front, YAML takes them for a text.
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    if isinstance(value, float):
        # YAML takes 1e-3 for a text.
        text = repr(value)
        return text if "e" not in text or "." in text else text.replace("e", ".0e")
    value = list(value) if isinstance(value, tuple) else value
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return dumped.removesuffix("\n").removesuffix("\n...")
