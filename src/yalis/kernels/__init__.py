# SPDX-License-Identifier: Apache-2.0
"""Kernels for NVIDIA GPUs, in Triton and CUDA C++: what a decode step is made of, near the memory's speed.

Imported only where there is a GPU. `yalis/kernels/reference.py` says in plain torch what each kernel
computes; tests hold them equal.
"""
