"""The model's fused operations, on whichever device their tensors are.

CUDA tensors go to Triton kernels, imported at the first call, or to the library where that is
faster; all others to the plain torch forms in ``reference`` and to torch's own linear layer. A
machine without a GPU therefore never imports Triton. Attention kernels are
not here: an attention backend picks those itself.
"""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.kernels.normed import HeadInputs, Normed

__all__ = [
    "HeadInputs",
    "Normed",
    "add_rms_norm",
    "find_cut",
    "linear",
    "linear_add_norm",
    "linear_norm_rope_store",
    "linear_row_counts",
    "linear_silu_mul",
    "resolve_tokens",
    "rms_norm",
    "sample",
    "silu_mul",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``: ``x [..., H]``, ``weight [H]`` -> ``[..., H]``."""
    return _module("norm", x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``reference.add_rms_norm``: returns ``rms_norm(x + residual), x + residual``."""
    return _module("norm", x).add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ``reference.silu_mul``: ``[T, 2I] -> [T, I]``."""
    return _module("activation", gate_up).silu_mul(gate_up)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See ``reference.linear``: ``x [N, K], weight [M, K] -> [N, M]``."""
    return _linear(Normed(x), weight, bias)


def linear_silu_mul(x: Normed, gate_up_weight: Tensor) -> Tensor:
    """See ``reference.linear_silu_mul``: ``x [N, K], gate_up_weight [2I, K] -> [N, I]``."""
    values = x.values
    if _few_rows(values):
        return _module("small_gemm", values).linear_silu_mul(x, gate_up_weight)
    if values.is_cuda:
        paired_gemm = _module("paired_gemm", values)
        if paired_gemm.supports_silu_mul(values, gate_up_weight):
            return paired_gemm.linear_silu_mul(x.divided(), gate_up_weight)
    return silu_mul(F.linear(x.divided(), gate_up_weight))


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Normed, Tensor]:
    """See ``reference.linear_add_norm``: ``(rms_norm(s), s)`` for ``s = linear(x) + residual``.

    For up to 8 rows in bfloat16, the norm's division is left to the layer that comes next.

    NOTE: ``residual`` is used up: on CUDA, s may be written over it.
    """
    # What is not divided yet needs bfloat16's range: float16 ends at 65504.
    if _few_rows(x) and x.dtype == torch.bfloat16:
        small_gemm = _module("small_gemm", x)
        return small_gemm.linear_add_norm(x, weight, bias, residual, norm_weight, eps)
    if x.is_cuda:
        split_gemm = _module("split_gemm", x)
        if split_gemm.supports(x, weight, bias):
            y, total = split_gemm.linear_add_norm(x, weight, residual, norm_weight, eps)
            return Normed(y), total
        if bias is None:
            # The library adds the residual while its result is in registers, so the norm reads one
            # matrix instead of two: 3 us less for 1024 rows of 4096.
            total = residual.addmm_(x, weight.t())
            return Normed(rms_norm(total, norm_weight, eps)), total
    y, total = add_rms_norm(F.linear(x, weight, bias), residual, norm_weight, eps)
    return Normed(y), total


def linear_norm_rope_store(
    x: Normed, weight: Tensor, bias: Tensor | None, inputs: HeadInputs
) -> Tensor:
    """See ``reference.linear_norm_rope_store``: returns q, writes k and v to their slots."""
    if x.values.is_cuda and not _few_rows(x.values):
        paired_gemm = _module("paired_gemm", x.values)
        if paired_gemm.supports_heads(x.values, weight, inputs):
            return paired_gemm.linear_norm_rope_store(x.divided(), weight, bias, inputs)
    qkv = _linear(x, weight, bias)
    return _module("rope", qkv).qk_norm_rope_store(qkv, *inputs)


def resolve_tokens(input_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """See ``reference.resolve_tokens``: ids below 0 become the token of the seat they name."""
    return _module("tokens", input_ids).resolve_tokens(input_ids, last_tokens)


def find_cut(
    logits: Tensor,
    temperatures: Tensor,
    rows: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.find_cut``: where the likely tokens of ``logits[rows]`` end."""
    return _module("likely", logits).find_cut(logits, temperatures, rows, top_k, top_p)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    steps: Tensor,
    cut: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See ``reference.sample``: one token per row of ``logits [N, V]`` -> ``[N]`` int64."""
    return _module("sampling", logits).sample(logits, temperatures, seeds, steps, cut)


def linear_row_counts(paired: list[Tensor], split: list[Tensor]) -> list[int]:
    """Numbers of rows that meet every form of the linear layers on CUDA.

    Args:
        paired: weights of layers whose outputs are wanted in pairs: QKV, gate and up.
        split: weights of layers before a norm: output and down projection.
    """
    small_gemm, paired_gemm, split_gemm = (
        import_module(f"nanovllm.kernels.{name}")
        for name in ("small_gemm", "paired_gemm", "split_gemm")
    )
    counts = set(small_gemm.row_counts())
    counts.update(*map(paired_gemm.row_counts, paired), *map(split_gemm.row_counts, split))
    return sorted(counts)


def _linear(x: Normed, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _few_rows(x.values):
        return _module("small_gemm", x.values).linear(x, weight, bias)
    return F.linear(x.divided(), weight, bias)


def _few_rows(x: Tensor) -> bool:
    return x.is_cuda and _module("small_gemm", x).supports(x)


# NOTE: no kernel module may bear the name of a function above. Importing a submodule binds its
# name in this package, so the first call on CUDA would replace the function by the module.
def _module(name: str, x: Tensor) -> Any:
    return import_module(f"nanovllm.kernels.{name}") if x.is_cuda else reference
