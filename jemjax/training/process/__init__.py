"""The process of a run: other hosts beside it, and signals that end it."""
