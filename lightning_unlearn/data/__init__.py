"""Mapping between dataset indices and batch rows; format of batches, outputs and labels."""
