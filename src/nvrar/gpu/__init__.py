"""Executor 2: the plan as one fused CUDA kernel."""
