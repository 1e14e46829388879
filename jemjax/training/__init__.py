"""Training, in seven rooms.

`config`, `step` and `process` know none of the others. `storage` stands on them,
`reporting` on `storage`, `run` on all five, and `inspect` on `run`. A test reads the
imports and keeps it so.
"""
