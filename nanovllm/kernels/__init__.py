"""The model's fused operations, on whichever device their tensors are.

CUDA tensors go to Triton kernels (`triton_ops`), or to cuBLAS where that is faster; all others to
the plain torch forms in `reference`, and to torch's own linear layer. A machine without a GPU never
imports Triton. Attention is not here: an attention back end picks its own kernels.
"""

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.normed import HeadInputs, Normed

__all__ = [
    "HeadInputs",
    "Normed",
    "add_rms_norm",
    "find_threshold",
    "linear",
    "linear_add_norm",
    "linear_norm_rope_store",
    "linear_silu_mul",
    "resolve_tokens",
    "rms_norm",
    "sample",
    "silu_mul",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`: ``x [..., H]``, ``weight [H]`` -> ``[..., H]``."""
    return _ops(x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`: returns ``rms_norm(x + residual), x + residual``."""
    return _ops(x).add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`: ``[T, 2I] -> [T, I]``."""
    return _ops(gate_up).silu_mul(gate_up)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `reference.linear`: ``x [N, K], weight [M, K] -> [N, M]``, in `out` if it is given."""
    return _linear(Normed(x), weight, bias, out)


def linear_silu_mul(x: Normed, gate_up_weight: Tensor) -> Tensor:
    """See `reference.linear_silu_mul`: ``x [N, K], gate_up_weight [2I, K] -> [N, I]``."""
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
    """See `reference.linear_add_norm`: ``(rms_norm(s), s)`` for ``s = linear(x) + residual``.

    For up to 8 rows in bfloat16, the norm's division is left to the layer that comes next.

    NOTE: `residual` is used up: on CUDA, s may be written over it.
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
            return Normed(ops.rms_norm(total, norm_weight, eps)), total
    y, total = add_rms_norm(F.linear(x, weight, bias), residual, norm_weight, eps)
    return Normed(y), total


def linear_norm_rope_store(
    x: Normed, weight: Tensor, bias: Tensor | None, inputs: HeadInputs
) -> Tensor:
    """See `reference.linear_norm_rope_store`: returns q, writes k and v to their slots."""
    values = x.values
    if values.is_cuda:
        ops = _triton_ops()
        if not ops.small_gemm.supports(values) and ops.fused_gemm.supports_heads(
            values, weight, inputs
        ):
            return ops.fused_gemm.linear_norm_rope_store(x.materialize(), weight, bias, inputs)
    qkv = _linear(x, weight, bias)
    return _ops(qkv).qk_norm_rope_store(qkv, inputs)


def resolve_tokens(input_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """See `reference.resolve_tokens`: ids below 0 become a last token."""
    return _ops(input_ids).resolve_tokens(input_ids, last_tokens)


def find_threshold(
    logits: Tensor,
    temperatures: Tensor,
    rows: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `reference.find_threshold`: the least of `logits[rows]` that may be drawn."""
    return _ops(logits).find_threshold(logits, temperatures, rows, top_k, top_p)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    steps: Tensor,
    threshold: tuple[Tensor, Tensor] | None = None,
    part: tuple[int, int] | None = None,
) -> Tensor:
    """See `reference.sample`: one token, or key, per row of ``logits [N, V]`` -> ``[N]`` int64."""
    return _ops(logits).sample(logits, temperatures, seeds, steps, threshold, part)


def weigh(
    logits: Tensor, temperatures: Tensor, rows: Tensor, peaks: Tensor, keys: Tensor
) -> Tensor:
    """See `reference.weigh`: number and weight of the logits from keys on."""
    return _ops(logits).weigh(logits, temperatures, rows, peaks, keys)


def _linear(x: Normed, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if x.values.is_cuda and _triton_ops().small_gemm.supports(x.values):
        return _triton_ops().small_gemm.linear(x, weight, bias, out)
    if out is None:
        return F.linear(x.materialize(), weight, bias)
    if bias is None:
        return torch.mm(x.materialize(), weight.t(), out=out)
    return torch.addmm(bias, x.materialize(), weight.t(), out=out)


def _ops(x: Tensor) -> ModuleType:
    return _triton_ops() if x.is_cuda else reference


@functools.cache
def _triton_ops() -> ModuleType:
    from nanovllm.kernels import triton_ops

    return triton_ops
