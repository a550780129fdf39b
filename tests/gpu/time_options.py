"""What rows that ask for more cost a decode step: microseconds.

    python tests/gpu/time_options.py --json options.json

512 sequences of the 0.6B shape with random weights: plain sampling, log-probabilities, penalties, a
bias, min_p, and JSON (which needs xgrammar). The time is the median of calls of `LLM.step`, which
launches steps ahead, but for rows that follow a grammar.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanovllm import LLM, SamplingParams
from nanovllm.bench.shapes import shape_directory
from tests import small_tokenizers

VOCAB = 151_936
STEPS, WARM_UP = 60, 15
# Whose completions go on for longer than these steps.
SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs=5": {"logprobs": 5},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": {7: 1.0, 11: -1.0}},
    "min_p": {"min_p": 0.05},
    "JSON": {"json_schema": SCHEMA},
}


def large_vocabulary() -> list[str | bytes]:
    """Pieces of letters for a tokenizer of VOCAB tokens, two of which are added ones.

    Digits stand alone, as in Qwen's vocabulary: every token of several digits may fit where a
    number is due, and for each row xgrammar tries them one by one (5 ms instead of 16 us).
    """
    draw, letters = random.Random(0), b"etaoin shrdlu cmfwypvbgkqjxz,[]-"
    pieces: dict[bytes, None] = {}
    while len(pieces) < VOCAB - 256 - 2:
        pieces[bytes(draw.choices(letters, k=draw.randint(2, 6)))] = None
    return list(pieces)


def step_microseconds(engine: LLM, rows: int, options: dict[str, Any]) -> float:
    for row in range(rows):
        params = SamplingParams(max_tokens=STEPS + 5, ignore_eos=True, seed=row, **options)
        engine.add_request([7 + row % 97, 8, 9], params)
    times = []
    while not engine.is_finished():
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:STEPS]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="of the engine")
    parser.add_argument("--layers", type=int, help="of the model; all if not given")
    parser.add_argument("--rows", type=int, default=512, help="sequences")
    parser.add_argument("--rounds", type=int, default=2, help="of all ways, in turn")
    parser.add_argument("--json", default="options.json", help="where to write the figures")
    arguments = parser.parse_args()
    measured: dict[str, list[float]] = {way: [] for way in WAYS}
    with shape_directory("0.6B", arguments.layers) as directory:
        small_tokenizers.write(small_tokenizers.byte_level(large_vocabulary()), Path(directory))
        with LLM(
            directory, device=arguments.device, load_format="dummy", max_num_seqs=arguments.rows,
            max_model_len=256,
        ) as engine:  # fmt: skip
            for way in list(WAYS) * (arguments.rounds + 1):
                measured[way].append(step_microseconds(engine, arguments.rows, WAYS[way]))
    # What a way does for the first time is not counted.
    medians = {way: round(statistics.median(times[1:]), 1) for way, times in measured.items()}
    for way, median in medians.items():
        print(f"{way:12} {median:10.1f} {median - medians['plain']:+10.1f}")
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    summary = {"device": gpu, "rows": arguments.rows, "us": medians}
    Path(arguments.json).write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
