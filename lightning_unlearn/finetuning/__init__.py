"""Fine-tuning on the clean subset (step 5)."""
