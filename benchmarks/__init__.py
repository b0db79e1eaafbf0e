"""Measurements of lightning_unlearn. Not part of the package: run from a checkout."""
