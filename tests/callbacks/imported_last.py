"""Imported by the process that is forked, after all else: what no fork of it need do again.

At every Trainer, Lightning asks for callbacks of other packages, for which the metadata of all are read. And the first
garbage collection of a fork would write to each of a million objects, so that their memory had to be copied.
"""

import functools
import gc

from lightning.fabric.utilities import registry

registry.entry_points = functools.cache(registry.entry_points)
registry._load_external_callbacks("lightning.pytorch.callbacks_factory")
gc.collect()
gc.freeze()
