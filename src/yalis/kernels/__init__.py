# SPDX-License-Identifier: Apache-2.0
"""Kernels for NVIDIA GPUs, in Triton and CUDA C++: what a decode step is made of, near the memory's speed.

Imported only where there is a GPU. `yalis/layers/functional.py` says in plain torch what they compute; tests
hold them equal.
"""
