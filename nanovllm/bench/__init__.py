"""What `bench_pipeline.py` measures with; the engine itself imports nothing of this.

shapes.py      Qwen3's published shapes, to be filled with random weights
arms.py        the pipeline modes beside each other on one engine
workload.py    decode steps at a given batch and context, without a prefill before them
compare.py     the arms in turn: their step times
floor.py       the time below which no step can be: bytes over bandwidth
nano.py        nano-vllm's own benchmark
report.py      tables, and one JSON object
"""


class BenchError(ValueError):
    """What was asked for cannot be measured here; the message says why."""
