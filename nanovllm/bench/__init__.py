"""What `bench_pipeline.py` measures with; the engine itself imports nothing of this.

command_line.py  its options, and what they are where nothing is said
engines.py       the engine to measure
shapes.py        Qwen3's published shapes, to be filled with random weights
arms.py          the pipeline modes beside each other on one engine
workload.py      decode steps at a given batch and context, without a prefill before them
compare.py       the arms in turn: their step times
power.py         ... and what the GPU drew meanwhile
floor.py         the time below which no step can be: bytes over bandwidth
nano.py          nano-vllm's own benchmark
idle.py          ... and the time in which the GPU waits for its next step
prefill.py       prefill alone
curves.py        attention bandwidth and GEMM rate against SM count
report.py        tables, and one JSON object
sweep.py         the map: all arms over shapes, batches and contexts
gains.py         ... what it says of each point, and in sum
map_report.py    ... as a table
heat_map.py      ... as a picture
growing.py       all arms on sequences that grow from a short context to a long one
growing_report.py ... as a table
"""


class BenchError(ValueError):
    """What was asked for cannot be measured here; the message says why."""


class DoesNotFit(BenchError):
    """... because there is not enough memory, or the model is not made for so long sequences."""
