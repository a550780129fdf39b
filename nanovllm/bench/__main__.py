"""Measures the engine and its pipeline modes on random weights of published shapes.

python -m nanovllm.bench                        Qwen3-0.6B's shape; without a GPU the tiny model
python -m nanovllm.bench --shape 8B --batch 512 --context 512 --attention-sms 36 --ffn-sms 96
python -m nanovllm.bench --model Qwen/Qwen3-4B --modes green auto --json result.json
python -m nanovllm.bench --workload growing     contexts from 128 to 4096: fixed splits and auto
python -m nanovllm.bench --workload throughput --requests chat --shape 8B --mode auto
python -m nanovllm.bench --workload nano        nano-vllm's own benchmark, prefill included
python -m nanovllm.bench --workload prefill     prompts alone, at the 8B shape
python -m nanovllm.bench --map --plot map.png --json map.json    where the pipeline pays
python -m nanovllm.bench --map --plot map.png --from map.json    the same picture, drawn again
python -m nanovllm.bench --curves --plot curves.png              what SMs are worth

`--workload NAME --help` lists the options of a workload.

Prints a table and, as the last line, one JSON object; that of --map is long, so with --json it goes
there alone. A step's time is wall time, from the end of one step to the end of the next:
scheduling, model, and tokens on the host. Ratios are speed: above 1 is faster than sequential. On a
GPU, "of floor" says how near a step comes to the time in which weights and KV cache can be read.
Progress goes to stderr. What is measured when it ends early (Ctrl-C, an error) is printed all the
same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

try:
    import numpy  # noqa: F401  torch would swallow a Ctrl-C while it imports it

    from nanovllm.bench import BenchError, curves, decode, gain_map, growing, report, throughput
    from nanovllm.bench.options import PROGRAM, parse
    from nanovllm.engine.parallel.processes import RankDiedError
    from nanovllm.utils.command_line import in_one_line
except KeyboardInterrupt:  # torch takes its time
    sys.exit(130)

WORKLOADS = {
    "decode": decode,
    "growing": growing,
    "nano": throughput,
    "throughput": throughput,
    "prefill": throughput,
    "map": gain_map,
    "curves": curves,
}


def main(argv: Sequence[str] | None = None) -> None:
    record = written = None
    with in_one_line(PROGRAM, BenchError, OSError, RankDiedError):
        args = parse(__doc__, argv)
        workload = WORKLOADS[args.workload]
        try:
            for record in workload.run(args):
                written = report.write_record(record, args.json)
        finally:
            if record is not None:
                try:
                    print(workload.describe(record))
                    if args.plot is not None:
                        workload.draw(record, args.plot)
                finally:
                    if args.workload != "map" or written is not record:
                        print(json.dumps(record))


if __name__ == "__main__":
    main()
