"""How every command's help looks: a sentence, examples that run, options with their defaults."""

from __future__ import annotations

import argparse
from typing import Any


def examples(*lines: str) -> str:
    """Return the end of a help: commands that can be copied."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def add_command(commands: Any, name: str, what: str, description: str, *lines: str) -> argparse.ArgumentParser:
    """Add a command whose options argparse reads.

    Args:
        commands: what ``add_subparsers`` returned.
        name: of the command.
        what: it does, in one line.
        description: what its help begins with.
        lines: examples.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=description,
        epilog=examples(*lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
