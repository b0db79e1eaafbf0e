"""The command ``lightning-unlearn``."""

from lightning_unlearn.cli._main import main

__all__ = ["main"]
