"""Which command it is, and who runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import lightning_unlearn
from lightning_unlearn.cli._completion import SHELLS, PrintCompletion
from lightning_unlearn.cli._demo import add_demo, run_demo
from lightning_unlearn.cli._errors import exit_with_message
from lightning_unlearn.cli._examples import examples
from lightning_unlearn.cli._init import add_init, run_init
from lightning_unlearn.cli._report import add_report, run_report
from lightning_unlearn.cli._results import add_show, run_show
from lightning_unlearn.utilities.checks import did_you_mean

# Of the commands that LightningCLI reads, which is imported when one of them runs.
_NO_JSONARGPARSE = "needs jsonargparse, which is not installed: pip install 'jsonargparse[signatures]'."

_HELP = {
    "fit": "train, with the callbacks in the YAML: LightningCLI's fit",
    "partition": "find wrong training labels: train until they can be detected, then stop",
    "shrink": "cut the pruned neurons out of a checkpoint; outputs stay the same",
}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; what follows ``fit`` is read by LightningCLI's."""
    parser = argparse.ArgumentParser(
        prog="lightning-unlearn",
        description=lightning_unlearn.__doc__,
        epilog=examples(
            "lightning-unlearn demo --fast",
            "lightning-unlearn init --model team.Net --data team.Data --out run.yaml",
            "lightning-unlearn partition --config run.yaml --model team.Net --data team.Data",
            "lightning-unlearn report partition --open",
        )
        + '\n  eval "$(lightning-unlearn --print-completion bash)"   # or once into a file that the shell reads'
        "\n\nlightning-unlearn COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {lightning_unlearn.__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print a completion script for this shell",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    add_demo(commands)
    for name, what in _HELP.items():
        commands.add_parser(name, add_help=False, help=what)
    add_report(commands)
    add_show(commands)
    add_init(commands)
    return parser


def _fit(arguments: Sequence[str]) -> None:
    from lightning_unlearn.cli._config import run_fit

    run_fit(arguments)


def _partition(arguments: Sequence[str]) -> None:
    from lightning_unlearn.cli._judge import run_partition

    run_partition(arguments)


def _shrink(arguments: Sequence[str]) -> None:
    from lightning_unlearn.cli._shrink import run_shrink

    run_shrink(arguments)


_WITH_CONFIG: dict[str, Callable[[Sequence[str]], None]] = {"fit": _fit, "partition": _partition, "shrink": _shrink}
_PLAIN: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": run_demo,
    "report": run_report,
    "show": run_show,
    "init": run_init,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    The process ends with status 0 when it is done, 2 where it was called wrongly, and 1 where it failed: with one
    sentence for what the user can mend, with a traceback for anything else.

    Args:
        arguments: instead of those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    if not given:
        parser.print_help()
        return
    if given[0] in _WITH_CONFIG:
        with exit_with_message(given[0]):
            # LightningCLI can be imported without it, but not made.
            _require_jsonargparse(given[0])
            _WITH_CONFIG[given[0]](given[1:])
        return
    _check_command(parser, given[0])
    options = parser.parse_args(given)
    if options.command is None:
        parser.error("expected a command; lightning-unlearn --help lists them.")
    with exit_with_message(options.command):
        if options.command == "init":
            _require_jsonargparse(options.command)
        _PLAIN[options.command](options)


def _require_jsonargparse(command: str) -> None:
    try:
        import jsonargparse  # noqa: F401
    except ImportError as error:
        raise ImportError(f"lightning-unlearn {command} {_NO_JSONARGPARSE}") from error


def _check_command(parser: argparse.ArgumentParser, name: str) -> None:
    """Refuse an unknown command, with the nearest; argparse does so from Python 3.14 on."""
    known = [*_WITH_CONFIG, *_PLAIN]
    if name.startswith("-") or name in known:
        return
    parser.error(f"unknown command {name!r}; choose from {', '.join(sorted(known))}.{did_you_mean(name, known)}")
