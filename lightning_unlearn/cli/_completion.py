"""Completion scripts for shells, with the options of all commands; made by shtab."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
_FILES, _FOLDERS = ("config", "ckpt_path", "csv", "json", "file", "review"), ("run", "control")


class PrintCompletion(argparse.Action):
    """Prints the script and ends the process."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            raise SystemExit(
                "lightning-unlearn --print-completion needs shtab, which is not installed: pip install shtab."
            ) from None
        complete = {**dict.fromkeys(_FILES, shtab.FILE), **dict.fromkeys(_FOLDERS, shtab.DIRECTORY)}
        for command in _commands_of(parser):
            for action in options_with_config(command.prog.split()[-1]):
                _add_like(command, action)
            for action in command._actions:
                if action.dest in complete:
                    action.complete = complete[action.dest]  # type: ignore[attr-defined]  # where shtab looks for it
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def _commands_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return list(commands.choices.values())


def options_with_config(name: str) -> list[argparse.Action]:
    """Return the options of a command that LightningCLI reads; of others none."""
    if name not in ("fit", "partition", "shrink"):
        return []
    from lightning_unlearn.cli._config import FitOptions, options_of
    from lightning_unlearn.cli._partition import PartitionCLI
    from lightning_unlearn.cli._shrink import ShrinkCLI

    return options_of({"fit": FitOptions, "partition": PartitionCLI, "shrink": ShrinkCLI}[name])


def _add_like(command: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Add an option of the same names; only completion uses it."""
    known = {name for one in command._actions for name in one.option_strings}
    names = [name for name in action.option_strings if name not in known]
    if names:
        help = (action.help or "").split(". ")[0].partition("(")[0].strip()
        nargs: dict[str, Any] = {"action": "store_true"} if action.nargs == 0 else {"choices": action.choices}
        command.add_argument(*names, dest=action.dest, help=" ".join(help.split())[:80] or None, **nargs)
