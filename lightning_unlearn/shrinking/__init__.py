"""Cut silent neurons out of a pruned model, with the same outputs."""

from lightning_unlearn.shrinking.checkpoint import FORMAT, load_shrunk, save_shrunk
from lightning_unlearn.shrinking.cost import ModelCost, compare, measure
from lightning_unlearn.shrinking.cut import shrink
from lightning_unlearn.shrinking.equivalence import ExampleInput

__all__ = ["FORMAT", "ExampleInput", "ModelCost", "compare", "load_shrunk", "measure", "save_shrunk", "shrink"]
