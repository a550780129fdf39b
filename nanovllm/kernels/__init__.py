"""The model's fused operations, on whichever device their tensors are.

CUDA tensors go to Triton kernels, or to cuBLAS where that is faster; all others to the plain torch
forms in `reference` and `reference_sampling`, which say what each operation is, and to torch's own
linear layer. A machine without a GPU never imports Triton. An attention back end picks its own
kernels.

NOTE: no module here may bear the name of one of these functions.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import reference, reference_sampling
from nanovllm.kernels.normed import HeadInputs, Normed

_Operation = TypeVar("_Operation", bound=Callable[..., Any])


@functools.cache
def _module(name: str) -> ModuleType:
    return import_module(f"nanovllm.kernels.{name}")


def _by_device(slow: _Operation, module: str) -> _Operation:
    """A plain form, or the kernel of its name in `module` where the first tensor is on CUDA."""

    @functools.wraps(slow)
    def operation(*args: Any, **kwargs: Any) -> Any:
        run = getattr(_module(module), slow.__name__) if args[0].is_cuda else slow
        return run(*args, **kwargs)

    return operation  # type: ignore[return-value]


rms_norm = _by_device(reference.rms_norm, "norm")
add_rms_norm = _by_device(reference.add_rms_norm, "norm")
silu_mul = _by_device(reference.silu_mul, "activation")
resolve_tokens = _by_device(reference.resolve_tokens, "tokens")
find_threshold = _by_device(reference_sampling.find_threshold, "top_k_top_p")
sample = _by_device(reference_sampling.sample, "sampling")
narrow = _by_device(reference_sampling.narrow, "split_logits")
collect = _by_device(reference_sampling.collect, "split_logits")
tie_end = _by_device(reference_sampling.tie_end, "split_logits")
_qk_norm_rope_store = _by_device(reference.qk_norm_rope_store, "rope")


def linear(
    x: Normed, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias`` of ``x [N, K]`` and ``weight [M, K]``; in `out` if it is given."""
    if x.values.is_cuda and _module("small_gemm").supports(x.values):
        return _module("small_gemm").linear(x, weight, bias, out)
    if out is None:
        return F.linear(x.materialize(), weight, bias)
    if bias is None:
        return torch.mm(x.materialize(), weight.t(), out=out)
    return torch.addmm(bias, x.materialize(), weight.t(), out=out)


def linear_silu_mul(x: Normed, gate_up_weight: Tensor) -> Tensor:
    """``silu_mul(linear(x, gate_up_weight))`` of ``gate_up_weight [2I, K]`` -> ``[N, I]``."""
    if x.values.is_cuda:
        small_gemm, fused_gemm = _module("small_gemm"), _module("fused_gemm")
        if small_gemm.supports(x.values):
            return small_gemm.linear(x, gate_up_weight, gated=True)
        if fused_gemm.supports_silu_mul(x.values, gate_up_weight):
            return fused_gemm.linear_silu_mul(x.materialize(), gate_up_weight)
    return silu_mul(F.linear(x.materialize(), gate_up_weight))


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Normed, Tensor]:
    """``add_rms_norm(linear(x, weight, bias), residual, norm_weight, eps)``.

    The norm's division may be left to the next layer.

    NOTE: `residual` is used up: on CUDA, the sum may be written over it.
    """
    if x.is_cuda:
        small_gemm, fused_gemm = _module("small_gemm"), _module("fused_gemm")
        # What is not divided yet needs bfloat16's range: float16 ends at 65504.
        if small_gemm.supports(x) and x.dtype == torch.bfloat16:
            return small_gemm.linear_add_norm(x, weight, bias, residual, norm_weight, eps)
        if fused_gemm.supports_add_norm(x, weight, bias):
            y, total = fused_gemm.linear_add_norm(x, weight, residual, norm_weight, eps)
            return Normed(y), total
        if bias is None:
            # cuBLAS adds the residual while its result is in registers: the norm reads one matrix
            # instead of two.
            total = residual.addmm_(x, weight.t())
            return Normed(rms_norm(total, norm_weight, eps)), total
    y, total = add_rms_norm(F.linear(x, weight, bias), residual, norm_weight, eps)
    return Normed(y), total


def linear_norm_rope_store(
    x: Normed, weight: Tensor, bias: Tensor | None, inputs: HeadInputs
) -> Tensor:
    """``qk_norm_rope_store(linear(x, weight, bias), inputs)``; see `reference`."""
    values = x.values
    if values.is_cuda and not _module("small_gemm").supports(values):
        fused_gemm = _module("fused_gemm")
        if fused_gemm.supports_heads(values, weight, inputs):
            return fused_gemm.linear_norm_rope_store(x.materialize(), weight, bias, inputs)
    return _qk_norm_rope_store(linear(x, weight, bias), inputs)
