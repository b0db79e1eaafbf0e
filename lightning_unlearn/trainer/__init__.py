"""Everything that touches the Trainer beyond the hooks of a callback."""
