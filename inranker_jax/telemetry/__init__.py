"""What a training run tells about itself: where its time goes, what it uses, and where that is written.

`monitor` brings it together: `phases` keeps the time, `usage` counts work and memory, `goodput` what counts of the
time over all sessions; `writers` show scalars and `profiling` traces. `docs/observability.md` lists every scalar.
"""
