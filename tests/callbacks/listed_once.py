"""Imported by the process that is forked: it reads the metadata of all packages, and no fork of it does so again.

At every Trainer, Lightning asks for callbacks of other packages.
"""

import functools

from lightning.fabric.utilities import registry

registry.entry_points = functools.cache(registry.entry_points)
registry._load_external_callbacks("lightning.pytorch.callbacks_factory")
