"""The CUDA backend: kernels, their compilation, and a runner over them. Imported only by who starts a CUDA engine."""
