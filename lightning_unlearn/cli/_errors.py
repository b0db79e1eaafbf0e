"""What a user can mend is said in one sentence; what is a bug, theirs or ours, keeps its traceback."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

# What is raised there on purpose says what to do.
_OURS, _LIGHTNING_CLI = "lightning_unlearn", "lightning.pytorch.cli"

# Of a process that SIGPIPE has ended, to a shell.
_NOBODY_READS = 141


@contextmanager
def exit_with_message(command: str) -> Iterator[None]:
    """End the process with status 1 and the message of an error that was raised for the user to read.

    Args:
        command: named in front of it.

    Raises:
        SystemExit: in place of such an error; with status 141, as other commands, where nobody reads on, as ``head``.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        if not is_user_error(error):
            raise
        # What is left to print would fail again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_NOBODY_READS) from error
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
        if not is_user_error(error):
            raise
        raise SystemExit(printable(f"lightning-unlearn {command}: error: {error}")) from error
    except Exception as error:
        if not _is_misconfiguration(error):
            raise
        raise SystemExit(printable(f"lightning-unlearn {command}: error: {error}")) from error


def is_user_error(error: BaseException) -> bool:
    """Return whether an error was raised by this package, or LightningCLI, not by a user's code or within a library."""
    raised_in = _module_of(error)
    if isinstance(error, RuntimeError):
        # Ours says that the package has a bug, LightningCLI's that it would overwrite a file.
        return raised_in == _LIGHTNING_CLI
    return raised_in == _LIGHTNING_CLI or raised_in.split(".")[0] == _OURS


def _module_of(error: BaseException) -> str:
    traceback, name = error.__traceback__, ""
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
    return name


def _is_misconfiguration(error: BaseException) -> bool:
    # By name, since it may be of either package of Lightning, which need not be imported.
    return any(kind.__name__ == "MisconfigurationException" for kind in type(error).__mro__)


def printable(text: str) -> str:
    r"""Return a text that is safe in a terminal: control and direction characters are shown as their numbers.

    Example:
        >>> print(printable("cat \x1b[2J"))
        cat \x1b[2J
    """
    return "".join(one if one in "\n\t" or _is_harmless(one) else repr(one)[1:-1] for one in text)


def _is_harmless(letter: str) -> bool:
    # Joiners are within words and emoji.
    return letter in "\u200c\u200d" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
