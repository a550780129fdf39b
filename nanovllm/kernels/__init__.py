"""The model's fused operations, on whichever device their tensors are.

CUDA tensors go to Triton kernels (`triton_ops`), or to cuBLAS where that is faster; all others to
the plain torch forms in `reference` and `reference_sampling`, which say what each operation is, and
to torch's own linear layer. A machine without a GPU never imports Triton. An attention back end
picks its own kernels.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import reference, reference_sampling
from nanovllm.kernels.normed import HeadInputs, Normed

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


@functools.cache
def _triton_ops() -> ModuleType:
    from nanovllm.kernels import triton_ops

    return triton_ops


def _by_device(slow: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """A plain form, or the kernel of its name where the first tensor is on CUDA."""

    @functools.wraps(slow)
    def operation(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        on_cuda = args[0].is_cuda  # type: ignore[attr-defined]
        run = getattr(_triton_ops(), slow.__name__) if on_cuda else slow
        return run(*args, **kwargs)

    return operation


rms_norm = _by_device(reference.rms_norm)
add_rms_norm = _by_device(reference.add_rms_norm)
silu_mul = _by_device(reference.silu_mul)
resolve_tokens = _by_device(reference.resolve_tokens)
find_threshold = _by_device(reference_sampling.find_threshold)
sample = _by_device(reference_sampling.sample)
narrow = _by_device(reference_sampling.narrow)
collect = _by_device(reference_sampling.collect)
tie_end = _by_device(reference_sampling.tie_end)
_qk_norm_rope_store = _by_device(reference.qk_norm_rope_store)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `reference.linear`; in `out` if it is given."""
    return _linear(Normed(x), weight, bias, out)


def linear_silu_mul(x: Normed, gate_up_weight: Tensor) -> Tensor:
    """See `reference.linear_silu_mul`."""
    if x.values.is_cuda:
        ops = _triton_ops()
        if ops.small_gemm.supports(x.values):
            return ops.small_gemm.linear_silu_mul(x, gate_up_weight)
        if ops.fused_gemm.supports_silu_mul(x.values, gate_up_weight):
            return ops.fused_gemm.linear_silu_mul(x.materialize(), gate_up_weight)
    return silu_mul(F.linear(x.materialize(), gate_up_weight))


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Normed, Tensor]:
    """See `reference.linear_add_norm`; the norm's division may be left to the next layer.

    NOTE: `residual` is used up: on CUDA, the sum may be written over it.
    """
    if x.is_cuda:
        ops = _triton_ops()
        # What is not divided yet needs bfloat16's range: float16 ends at 65504.
        if ops.small_gemm.supports(x) and x.dtype == torch.bfloat16:
            return ops.small_gemm.linear_add_norm(x, weight, bias, residual, norm_weight, eps)
        if ops.fused_gemm.supports_add_norm(x, weight, bias):
            y, total = ops.fused_gemm.linear_add_norm(x, weight, residual, norm_weight, eps)
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
    """See `reference.linear_norm_rope_store`."""
    values = x.values
    if values.is_cuda:
        ops = _triton_ops()
        if not ops.small_gemm.supports(values) and ops.fused_gemm.supports_heads(
            values, weight, inputs
        ):
            return ops.fused_gemm.linear_norm_rope_store(x.materialize(), weight, bias, inputs)
    return _qk_norm_rope_store(_linear(x, weight, bias), inputs)


def _linear(x: Normed, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if x.values.is_cuda and _triton_ops().small_gemm.supports(x.values):
        return _triton_ops().small_gemm.linear(x, weight, bias, out)
    if out is None:
        return F.linear(x.materialize(), weight, bias)
    if bias is None:
        return torch.mm(x.materialize(), weight.t(), out=out)
    return torch.addmm(bias, x.materialize(), weight.t(), out=out)
