"""Dataset index <-> batch row, and what batches, outputs and labels mean."""
