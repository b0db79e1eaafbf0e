"""A small real case: handwritten digits with wrong labels. The demo's model and data stand in for a user's own."""

from lightning_unlearn.demo.digits import DigitsClassifier, DigitsDataModule

__all__ = ["DigitsClassifier", "DigitsDataModule"]
