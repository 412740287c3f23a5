"""The path of XLA, which runs wherever JAX runs: `dense` and `experts`."""
