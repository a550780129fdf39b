"""`python -m nanovllm.bench`: what it measures with; the engine itself imports nothing of this.

__main__.py    the workloads by name; prints what they measure
options.py     the command line: which options each workload has, and their defaults
shapes.py      published shapes, to be filled with random weights
engines.py     starts the engine that is measured
arms.py        pipeline modes beside each other on one engine: the arms of a comparison
turns.py       the arms in turn: decode steps at a given batch and context, without a prefill
ceilings.py    what a device can do at best, and what a step needs
report.py      tables, and what a JSON object says of machine and engine

The workloads, each with `run`, which yields ever more complete records, and `describe`, its table:

decode.py      step times of the arms; power.py adds what the GPU draws
growing.py     the arms on contexts that grow
throughput.py  whole runs of requests (requests.py), step by step (step_log.py); prompts alone
gain_map.py    where the pipeline pays (gains.py: how much, pictures.py: drawn)
curves.py      what SMs are worth
"""


class BenchError(ValueError):
    """What was asked for cannot be measured here; the message says why."""


class DoesNotFit(BenchError):
    """There is not enough memory, or the model is not made for so long sequences."""
