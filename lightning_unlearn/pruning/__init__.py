"""Step 4: which neurons carry the noise, and keeping them at zero."""
