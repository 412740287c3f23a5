"""Timing the kernels: `jaxwna16 bench`. docs/benchmarks.md says how to run and read it."""
