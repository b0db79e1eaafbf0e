"""Fine-tuning on the clean subset: where it starts from."""
