# SPDX-License-Identifier: Apache-2.0
"""Whether a call can work with what it was given. Pure, but for looking at the tensors' layout."""

from __future__ import annotations

import torch
from torch import Tensor

from nvrar.host import OPS


def refusal_of_call(x: Tensor, out: Tensor | None, op: str) -> str:
    """Why an all-reduce cannot work with what it was given; empty if it can."""
    if not isinstance(x, torch.Tensor):
        return f"x is {type(x).__name__}, not a torch.Tensor"
    if is_spread(x):
        return (
            f"x is a {type(x).__name__}, which lies on several ranks; give this one's: x.to_local()"
        )
    if x.is_nested:
        return "x is a nested tensor; all_reduce takes dense tensors: give x.values()"
    if x.layout != torch.strided:
        return f"x has layout {x.layout}; all_reduce takes dense tensors: call x.to_dense() first"
    if op not in OPS:
        return f"op is {op!r}; it must be one of {', '.join(OPS)}"
    if op == "avg" and not x.dtype.is_floating_point:
        return f"op 'avg' needs a floating type and x is {x.dtype}; use 'sum' and divide"
    if out is None or (out is x and x.is_contiguous()):  # the common cases, sooner
        return ""
    return refusal_of_out(x, out)


def refusal_of_out(x: Tensor, out: Tensor, x_name: str = "x", out_name: str = "out") -> str:
    """Why ``out`` cannot receive a result like ``x``; empty if it can. The names are of the arguments."""
    if not isinstance(out, torch.Tensor):
        return f"{out_name} is {type(out).__name__}, not a torch.Tensor"
    if out is not x:
        if is_spread(out):
            return (
                f"{out_name} is a {type(out).__name__}, which lies on several ranks; give this one's: "
                f"{out_name}.to_local()"
            )
        for what in ("shape", "dtype", "device", "layout"):
            if getattr(out, what) != getattr(x, what):
                return (
                    f"{out_name} has {what} {getattr(out, what)}, {x_name} has {getattr(x, what)}; they must "
                    "be equal"
                )
        if overlap(x, out) and x.data_ptr() != out.data_ptr():
            return (
                f"{x_name} and {out_name} share part of their memory; give {out_name}={x_name}, or memory of "
                "its own"
            )
    if out.is_contiguous():
        return ""
    if 0 in out.stride() and any(
        n > 1 for n, s in zip(out.shape, out.stride(), strict=True) if s == 0
    ):
        return (
            f"elements of {out_name} share memory, as those of an expanded tensor do; give "
            f"{out_name}.clone()"
        )
    return ""


def is_spread(x: Tensor) -> bool:
    """Whether it is a DTensor, or the like. Not asked of its class, whose import takes long."""
    return type(x) is not torch.Tensor and hasattr(x, "to_local")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory. Not where one of them has gaps: there is a buffer in between then,
    and it does no harm."""
    if not (a.is_contiguous() and b.is_contiguous()):
        return False
    return -a.nbytes < a.data_ptr() - b.data_ptr() < b.nbytes
