"""The kernels for GPUs, lowered by Pallas through Triton, which this folder alone imports."""
