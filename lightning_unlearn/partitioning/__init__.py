"""Step 3: from evidence to one partition."""
