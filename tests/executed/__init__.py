"""The GPU kernels, compiled for four architectures and executed on a CPU by `tests.ptx`."""
