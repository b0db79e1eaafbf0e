"""Step 2: what the model shows of each sample while it trains."""
