"""Whether a call can work with what it was given. Pure, but for looking at the tensors' layout."""

from __future__ import annotations

import torch
from torch import Tensor

from nvrar.host import OPS


def refusal_of_call(x: Tensor, out: Tensor | None, op: str) -> str:
    if not isinstance(x, torch.Tensor):
        return f"x is {type(x).__name__}, not a torch.Tensor"
    if x.layout != torch.strided:
        return f"x has layout {x.layout}; all_reduce takes dense tensors: call x.to_dense() first"
    if op not in OPS:
        return f"op is {op!r}; it must be one of {', '.join(OPS)}"
    if op == "avg" and not x.dtype.is_floating_point:
        return f"op 'avg' needs a floating type and x is {x.dtype}; use 'sum' and divide"
    if out is None:
        return ""
    if not isinstance(out, torch.Tensor):
        return f"out is {type(out).__name__}, not a torch.Tensor"
    if out is not x:
        refusal = _refusal_of_pair(x, out)
        if refusal:
            return refusal
    if out.is_contiguous():  # the common case, at a tenth of the cost
        return ""
    if 0 in out.stride() and any(
        n > 1 for n, s in zip(out.shape, out.stride(), strict=True) if s == 0
    ):
        return "elements of out share memory, as those of an expanded tensor do; give out.clone()"
    return ""


def _refusal_of_pair(x: Tensor, out: Tensor) -> str:
    for what in ("shape", "dtype", "device", "layout"):
        if getattr(out, what) != getattr(x, what):
            return (
                f"out has {what} {getattr(out, what)}, x has {getattr(x, what)}; they must be equal"
            )
    if _partly_overlap(x, out):
        return "x and out share part of their memory; give out=x, or memory of its own"
    return ""


def _partly_overlap(x: Tensor, out: Tensor) -> bool:
    # Where one of them has gaps there is a buffer in between, and overlap does no harm.
    if not (x.is_contiguous() and out.is_contiguous()):
        return False
    return 0 < abs(x.data_ptr() - out.data_ptr()) < x.nbytes
