"""What is known of a fit from one hook to the next."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class FitMemory:
    """What is known of a fit from one hook to the next, and gone with it.

    Args:
        has_begun: whether all callbacks have been set up.
    """

    has_begun: bool = False
