"""How many KV blocks there are, and the memory behind them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.scheduler import ADMISSION_RESERVE
from nanovllm.layers.attention import HeadShape
from nanovllm.utils.device import GIB, check_fits, cpu_memory_errors

# On the CPU memory is shared with everything else, so the default is small.
CPU_LIMIT = 1 * GIB


def allocate(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    heads: HeadShape,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Zeros [layers, 2, num_blocks + 1, kv_heads, block_size, head_dim]; block 0 is padding.

    Raises MemoryError if they do not fit into the CPU's memory.
    """
    shape = (num_layers, 2, num_blocks + 1, heads.num_kv_heads, block_size, heads.head_dim)
    what = f"the KV cache ({num_blocks} blocks of {block_size} tokens)"
    if device.type == "cpu":
        num_bytes = math.prod(shape) * dtype.itemsize
        # The system grants more than there is, and ends the process that fills it.
        check_fits(num_bytes, device, what)
        with cpu_memory_errors(device, what):
            # NumPy's zeros, unlike torch's, take memory only once they are written.
            zeros = np.zeros(num_bytes, np.uint8)
        return torch.from_numpy(zeros).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def count_blocks(
    config: Config,
    block_bytes: int,  # of all layers of this rank
    max_model_len: int,
    device: torch.device,
    run_largest_step: Callable[[], None],  # to its end; its need of memory is measured on CUDA
) -> int:
    """Blocks to allocate: as configured, or as many as memory allows (on the CPU, as are useful).

    Raises MemoryError if not even one block fits.
    """
    if config.num_kvcache_blocks > 0:
        return config.num_kvcache_blocks
    if device.type != "cuda":
        most = config.max_num_seqs * -(-max_model_len // config.kvcache_block_size)
        useful = math.ceil((most + 1) / (1 - ADMISSION_RESERVE))  # or the last would wait
        return max(1, min(CPU_LIMIT // block_bytes, useful))
    budget = _free_for_cache(config.gpu_memory_utilization, device, run_largest_step)
    if budget < 2 * block_bytes:
        raise MemoryError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} leaves "
            f"{budget / GIB:.2f} GiB for the KV cache on {device}, less than a block and "
            f"the padding block ({2 * block_bytes / GIB:.3f} GiB): raise it, or lower "
            "max_num_batched_tokens"
        )
    return budget // block_bytes - 1  # one for padding


def _free_for_cache(
    utilization: float, device: torch.device, run_largest_step: Callable[[], None]
) -> int:
    """Bytes left of the share of memory once weights and the largest step are accounted for."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return int(total * utilization) - outside - peak
