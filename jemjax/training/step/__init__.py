"""One step, which needs nothing of a run: state, branches, loss, update."""
