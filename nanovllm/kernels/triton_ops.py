"""The Triton kernels, each function under the name of its plain form, see `kernels`.

NOTE: `nanovllm.kernels` has functions of these names, too, so no module may bear one of them.
"""

from nanovllm.kernels import fused_gemm, small_gemm
from nanovllm.kernels.activation import silu_mul
from nanovllm.kernels.norm import add_rms_norm, rms_norm
from nanovllm.kernels.rope import qk_norm_rope_store
from nanovllm.kernels.sampling import sample
from nanovllm.kernels.split_logits import collect, narrow, tie_end
from nanovllm.kernels.tokens import resolve_tokens
from nanovllm.kernels.top_k_top_p import find_threshold

__all__ = [
    "add_rms_norm",
    "collect",
    "find_threshold",
    "fused_gemm",
    "narrow",
    "qk_norm_rope_store",
    "resolve_tokens",
    "rms_norm",
    "sample",
    "silu_mul",
    "small_gemm",
    "tie_end",
]
