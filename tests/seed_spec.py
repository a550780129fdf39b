"""The specification's code blocks, options and printed lines, as they are written there.

The blocks are data, run as they stand; only the model's path is replaced by the embedded model's.
"""

import re
from typing import Any

from nanovllm.tiny import CHECKPOINT_DIR

QUICK_START = """
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine

# 创建配置，启用 pipeline
config = Config(
    model="Qwen3-0.6B",
    enable_pipeline=True,                # 启用流水线
    pipeline_attention_sm_count=16,      # Attention 阶段 SM 数量
    pipeline_ffn_sm_count=16,            # FFN 阶段 SM 数量
    pipeline_enable_profiling=True,      # 启用性能分析
)

# 初始化引擎
engine = LLMEngine(config)

# 正常使用 generate
outputs = engine.generate(
    prompts=["Hello, world!"],
    max_tokens=50,
)

# 查看流水线统计信息
engine.model_runner.print_pipeline_statistics()
"""

OPTIONS = """
| `enable_pipeline` | bool | False | 是否启用流水线执行 |
| `pipeline_attention_sm_count` | int | 16 | 分配给 Attention 阶段的 SM 数量 |
| `pipeline_ffn_sm_count` | int | 16 | 分配给 FFN 阶段的 SM 数量 |
| `pipeline_enable_profiling` | bool | False | 是否启用性能分析 |
"""

GREEN_MANAGER = """
# 初始化
green_manager = GreenContextManager(
    device=torch.device("cuda:0"),
    attention_sm_count=16,
    ffn_sm_count=16,
)

# 获取各阶段的 stream
attn_stream = green_manager.get_attention_stream()
ffn_stream = green_manager.get_ffn_stream()
"""

SCHEDULER = """
# 执行 decode token
logits = pipeline_scheduler.decode_token(
    input_ids=input_ids,
    positions=positions,
)

# 获取性能统计
stats = pipeline_scheduler.get_statistics()
"""

SPLIT_MODEL = """
# Attention 阶段
hidden_states, residual = model.forward_attention(input_ids, positions)

# FFN 阶段
hidden_states = model.forward_ffn(hidden_states, residual)
"""

PROFILING = """
config.pipeline_enable_profiling = True

# 运行后查看统计
engine.model_runner.print_pipeline_statistics()
"""

STATISTICS = """
[Pipeline Statistics]
  Total tokens processed: 128
  Avg attention time: 2.34 ms
  Avg FFN time: 3.12 ms
  Avg total time: 5.46 ms
"""

GREEN_FAILED = """
[GreenContextManager] Failed to initialize Green Context: CUDA error code=914
"""

FELL_BACK = """
[ModelRunner] Failed to initialize pipeline: ...
[ModelRunner] Falling back to sequential execution
"""

# Of the lines above, what the engine's reason follows, and what says that it goes on.
FAILED, FALLING_BACK = "[ModelRunner] Failed to initialize pipeline: ", FELL_BACK.splitlines()[-1]


def run_block(block: str, **names: Any) -> dict[str, Any]:
    """Runs a block of the specification; returns the names that it knows in the end."""
    exec(block.replace("Qwen3-0.6B", CHECKPOINT_DIR.as_posix()), names)
    return names


def lines_of(block: str) -> re.Pattern[str]:
    """Matches text that begins with the block's lines, with other numbers and any ellipsis."""
    pattern = re.escape(block.strip() + "\n").replace(re.escape("..."), ".+")
    return re.compile(re.sub(r"\d+(\\\.\d+)?", lambda n: r"\d+\.\d\d" if n[1] else r"\d+", pattern))
