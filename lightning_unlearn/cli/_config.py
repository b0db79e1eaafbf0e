"""LightningCLI for the commands that take a user's YAML: its help, its errors, and what it looks at before it runs."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]  # comes with Lightning, its types do not
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_unlearn.cli._classes import data_class, model_class
from lightning_unlearn.cli._errors import is_user_error
from lightning_unlearn.cli._examples import examples

_MISSING_MODULE = re.compile(r"No module named '([^']+)'")
_UNKNOWN_OPTION = re.compile(r"ption '([^']+)'(?: is not accepted)?$")
_PLACEHOLDER = re.compile(r"<fill in\b[^<>]*>")
# What Lightning looks up itself.
_NAMED_CHECKPOINTS = ("best", "last", "hpc", "registry")


def placeholder(kind: str) -> str:
    """Return what stands in a YAML for a value that only the user knows; no command runs before it is replaced.

    Example:
        >>> placeholder("int")
        '<fill in: int>'
    """
    return f"<fill in: {re.sub('[<>]', '', kind)}>"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of examples."""


class CommandParser(LightningArgumentParser):
    """An error is one line and not a page of usage."""

    # That runs: the parsers that are made on the way, for a class in a YAML, are called as the process.
    running = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=_HelpFormatter, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        if missing := _MISSING_MODULE.search(message):
            hint = f"Run the command in the folder that contains {missing[1].split('.')[0]!r}, or install it."
            message = f"{message}\n{hint}"
        if unknown := _UNKNOWN_OPTION.search(message):
            message += _nearest(parser, unknown[1])
        self.exit(2, _usage_error(self.running or _plain(parser.prog), message))

    @override
    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return _plain(super().format_help(*args, **kwargs))


def _nearest(parser: LightningArgumentParser, option: str) -> str:
    """Say which class lacks an option, where that is known, and which option may be meant."""
    near = difflib.get_close_matches(option, list(parser.get_defaults().keys()), n=1)
    # The parser of a class in a YAML, as of a callback, has one group, which is called so.
    groups = list(parser.groups or ())
    of_class = f" by {groups[0]}" if len(groups) == 1 else ""
    return of_class + (f"; did you mean '{near[0]}'?" if near else "")


def _usage_error(command: str, message: str) -> str:
    return f"{command}: error: {message}\nThe options are shown by: {command} --help\n"


def _plain(text: str) -> str:
    # jsonargparse shows that options may stand before the subcommand, which they may not here.
    return text.replace(" [options]", "")


class ConfigCLI(LightningCLI):
    """LightningCLI with only the command ``fit``, or none, and errors before anything is made."""

    command = "fit"

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Not as the parent does, which warns where a program hands over the arguments of its process.
        for file in _config_files(args):
            if said := _fault_of(file):
                parser.exit(2, _usage_error(f"lightning-unlearn {self.command}", said))
        CommandParser.running = f"lightning-unlearn {self.command}"
        try:
            self.config = parser.parse_args(args)
        finally:
            CommandParser.running = ""
        checkpoint = self.config.get(str(self.config.get("subcommand")), self.config).get("ckpt_path")
        if checkpoint is not None and not _may_exist(str(checkpoint)):
            raise ValueError(f"Expected --ckpt_path to name a checkpoint, but {checkpoint} does not exist.")

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            # jsonargparse tries all types that an option may have, and says of each why not.
            if (said := _said_by_us(error)) is None:
                raise
            raise ValueError(str(said)) from error

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}


def _said_by_us(error: BaseException | None) -> BaseException | None:
    """Return the message with which a class of this package refused an argument, if that caused an error."""
    while error is not None and not (isinstance(error, (TypeError, ValueError)) and is_user_error(error)):
        error = error.__cause__ or error.__context__
    return error


def add_fit_arguments(parser: LightningArgumentParser) -> list[str]:
    """Add what ``Trainer.fit`` takes beside model and data, as ``--ckpt_path``."""
    skip: set[str | int] = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
    added: list[str] = parser.add_method_arguments(Trainer, "fit", skip=skip)
    return added


def _may_exist(checkpoint: str) -> bool:
    is_looked_up = checkpoint.split(":")[0] in _NAMED_CHECKPOINTS or "://" in checkpoint
    return is_looked_up or Path(checkpoint).expanduser().exists()


def _values_of(arguments: Sequence[str], *names: str) -> list[str]:
    """Return what an option is given, each time that it is."""
    found = []
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            found.append(value if equals else "".join(arguments[at + 1 : at + 2]))
    return found


def without(arguments: Sequence[str], *names: str, flags: Collection[str] = ()) -> list[str]:
    """Return arguments without some options and their values.

    Args:
        arguments: of a command.
        names: of options with a value.
        flags: of those without.

    Example:
        >>> without(["--config", "run.yaml", "--top=3", "--out", "found", "--fast"], "--top", "--out", flags=["--fast"])
        ['--config', 'run.yaml']
    """
    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        if name in names:
            del rest[: 0 if equals else 1]
        elif argument not in flags:
            kept.append(argument)
    return kept


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for value in _values_of(arguments, "-c", "--config"):
        if (path := Path(value).expanduser()).is_file():
            yield path


def named_classes(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return classes for a YAML that has their arguments alone, as one of a script with ``LightningCLI(Net, Data)``.

    Args:
        arguments: of a command.

    Returns:
        the arguments without ``--model`` and ``--data`` where their classes are taken from there, and what LightningCLI
        is to be made with.

    Raises:
        ValueError: for such a YAML without ``--model`` or ``--data``.
    """
    kept, classes = list(arguments), {}
    for key, option, parameter, read in (
        ("model", "--model", "model_class", model_class),
        ("data", "--data", "datamodule_class", data_class),
    ):
        flat = [file for file in _config_files(arguments) if _is_flat(_content(file).get(key))]
        given = _values_of(arguments, option)
        if flat and not given:
            raise ValueError(
                f"{flat[0]} has the arguments of your {key} under '{key}:', but not its class, as where a script has"
                " LightningCLI(Net, Data); name the class: --model team.Net --data team.Data."
            )
        if flat:
            classes[parameter] = read(given[-1])
            kept = without(kept, option)
    return kept, classes


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and "class_path" not in value


def _content(file: Path) -> Mapping[str, Any]:
    """Return what a YAML holds; nothing of one that cannot be read, which is told elsewhere."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _fault_of(file: Path) -> str:
    """Say what keeps a YAML from being run; empty for one that cannot be read, on which the parser reports."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}, line {mark.line + 1}" if mark else f"{file}"
        return (
            f"{where}: invalid YAML ({error.problem}). Check the indentation; entries below init_args need"
            " init_args to be uncommented."
        )
    if isinstance(content, Mapping) and "trainer" not in content and isinstance(content.get("fit"), Mapping):
        return f"{file} has its settings below 'fit:'; move them to the top, where LightningCLI's fit reads them too."
    shown = ", ".join(f"{key} ({value})" for key, value in _walk("", content))
    return f"{file} has placeholders to fill in: {shown}; replace them." if shown else ""


def _walk(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and _PLACEHOLDER.fullmatch(value):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _walk(f"{key}.{name}".lstrip("."), part)
    elif isinstance(value, list):
        for at, part in enumerate(value):
            yield from _walk(f"{key}.{at}", part)


def find_users_classes() -> None:
    """Let a YAML name classes that lie in the folder where the command is run, as with ``python script.py``."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


FIT_HELP = """\
Trains with the callbacks in the YAML, like LightningCLI's fit: your model, data and Trainer, checkpoints and loggers
work as usual, and --ckpt_path resumes from a checkpoint. A YAML of your own script with LightningCLI(Net, Data) works
unchanged: name the classes with --model and --data."""
_FIT_EXAMPLES = examples(
    "lightning-unlearn fit --config run.yaml",
    "lightning-unlearn fit --config config.yaml --model team.Net --data team.Data",
    "lightning-unlearn fit --config run.yaml --trainer.max_epochs 40 --ckpt_path last.ckpt",
    "lightning-unlearn fit --config run.yaml --print_config",
)


def run_fit(arguments: Sequence[str]) -> None:
    """Run LightningCLI's fit."""
    find_users_classes()
    arguments, classes = named_classes(arguments)
    usage = "lightning-unlearn fit --config FILE [--model CLASS --data CLASS] [OPTION]..."
    fit: dict[str, Any] = {"description": FIT_HELP, "usage": usage, "epilog": _FIT_EXAMPLES}
    ConfigCLI(
        args=["fit", *arguments],
        parser_class=CommandParser,
        parser_kwargs={"prog": "lightning-unlearn", "fit": fit},
        **classes,
    )


class FitOptions(ConfigCLI):
    """The options of ``fit``, without the subcommand that LightningCLI needs to run it."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_fit_arguments(parser)


class _ParserMadeError(Exception):
    """A parser is there, and no more of the command line is wanted."""


def options_of(cli: type[ConfigCLI]) -> list[Any]:
    """Return the options that a command reads."""

    def give_back(self: ConfigCLI, parser: LightningArgumentParser, args: Any) -> None:
        raise _ParserMadeError(parser)

    try:
        type("ParserOnly", (cli,), {"parse_arguments": give_back})(run=False, parser_class=CommandParser)
    except _ParserMadeError as made:
        return [action for action in made.args[0]._actions if action.option_strings]
    return []
