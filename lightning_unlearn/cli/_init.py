"""``init``: a commented YAML for a user's model and data."""

from __future__ import annotations

import argparse
import inspect
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with Lightning, its types do not

from lightning_unlearn.cli._examples import add_command
from lightning_unlearn.utilities.files import replacing

_CALLBACKS = ("AttributionPartitionCallback", "CleanSubsetFinetuneCallback", "UnlearnReport")
# Not in use before a person takes it in, as pruning makes no network more accurate.
_OPTIONAL = ("SensitivityPruneCallback",)
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def add_init(commands: Any) -> None:
    """Add ``init``."""
    init = add_command(
        commands,
        "init",
        "print a commented YAML for your model and data",
        """\
Prints a YAML for lightning-unlearn fit and partition, and for your own script with LightningCLI(Net, Data): the
arguments of your classes with their types and defaults, the Trainer, and the callbacks with each option in a line.
Nothing needs to be set: what has no default stands as <fill in: type>, and fit says so until it is replaced. Where the
model can be built without arguments, its layers are listed.""",
        "lightning-unlearn init --model team.Net --data team.Data --out run.yaml",
        "lightning-unlearn init --model lightning_unlearn.demo.DigitsClassifier --data"
        " lightning_unlearn.demo.DigitsDataModule",
    )
    init.add_argument("--model", metavar="CLASS", help="dotted path of your LightningModule (default: named later)")
    init.add_argument("--data", metavar="CLASS", help="dotted path of your LightningDataModule (default: named later)")
    init.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: standard output)")


def run_init(options: argparse.Namespace) -> None:
    """Print or write the YAML."""
    from lightning_unlearn.cli._classes import data_class, layer_notes, model_class
    from lightning_unlearn.cli._config import find_users_classes

    find_users_classes()
    model = None if options.model is None else model_class(options.model)
    data = None if options.data is None else data_class(options.data)
    if options.out is not None and options.out.expanduser().exists():
        raise ValueError(f"Expected a new file, but {options.out} exists; give another --out, or remove it.")
    net, datamodule = options.model or "team.Net", options.data or "team.Data"
    arguments = f"--config {options.out or 'run.yaml'} --model {net} --data {datamodule}"
    lines = [
        f"# lightning-unlearn partition {arguments}   # which labels are wrong",
        f"# lightning-unlearn fit {arguments}         # trains with the callbacks",
        f"# python train.py fit --config {options.out or 'run.yaml'}   # the same, where your script has"
        f" LightningCLI({net.rpartition('.')[2]}, {datamodule.rpartition('.')[2]})",
        "# Nothing needs to be set. A line such as '# name: value' shows a default: to change it, remove the",
        "# leading '# ', also from the line above it that ends with a colon.",
        "seed_everything: 0",
        *_class("model", model),
        *_class("data", data),
        "trainer:",
        "  max_epochs: 30",
        "  # accelerator: auto  # cpu, gpu, mps",
        "  # devices: auto  # how many; DDP and FSDP2 work",
        "  callbacks:",
    ]
    layers = [] if model is None else layer_notes(model)
    for name in _CALLBACKS:
        lines += _callback(name, layers)
    for name in _OPTIONAL:
        lines += ["    # Optional: prunes neurons, for a smaller network, not for a more accurate one."]
        lines += [f"    # {_uncommented(line)[4:]}" for line in _callback(name, layers)]
    text = "\n".join(lines) + "\n"
    if options.out is None:
        print(text, end="")
        return
    with replacing(options.out) as file:
        file.write(text.encode())
    print(f"Written: {options.out}\nNext:\n  lightning-unlearn partition {arguments}")


def _callback(name: str, layers: Sequence[str]) -> Iterator[str]:
    import lightning_unlearn

    yield f"    - class_path: lightning_unlearn.{name}  # python -m pydoc lightning_unlearn.{name}"
    yield "      # init_args:"
    kind = getattr(lightning_unlearn, name)
    documented = _documented(kind)
    for one in inspect.signature(kind).parameters.values():
        if one.name == "layer":
            yield from (f"        ## {line}" for line in layers)
        yield f"        # {one.name}: {_value(one.default)}  # {_in_a_line(documented[one.name])}"


def _uncommented(line: str) -> str:
    """Return a line as it is once its comment sign is taken away."""
    return re.sub(r"^( *)# ", r"\1", line)


def _in_a_line(text: str) -> str:
    """Return a docstring's first sentence as plain text, cut where it is long."""
    plain = re.sub(r":\w+:`~?(?:.*?\.)?(\w+)(?: <.*?>)?`", r"\1", text).replace("`", "").replace('"', "")
    return textwrap.shorten(plain.split(". ")[0].rstrip("."), 110, placeholder=" ...")


def _class(key: str, kind: type[Any] | None) -> Iterator[str]:
    """Yield the arguments of a user's class, as LightningCLI(Net, Data) takes them."""
    arguments = [] if kind is None else list(_arguments(kind))
    if arguments:
        yield f"{'# ' if all(line.startswith('#') for line in arguments) else ''}{key}:"
        yield from (f"  {line}" for line in arguments)


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
    """Return what docstrings say of each argument, in a line."""
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
    """Return a value as it stands in a line of YAML."""
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
