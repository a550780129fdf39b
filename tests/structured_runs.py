"""Completions of the tiny model that follow random JSON schemas: do they end, and are they valid?

python tests/structured_runs.py --count 200
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

if __name__ == "__main__":  # the repository's packages, wherever the script is started
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanovllm import LLM, SamplingParams
from nanovllm.tiny import PROMPTS
from tests.random_schemas import RandomSchema

# Almost all end before. What is left are strings without a longest length: keys of maps.
MAX_TOKENS = 400


def errors(schema: dict[str, Any], text: str) -> list[str]:
    """Why a text is no JSON of that schema; none if it is."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return [f"{text!r}: {error}"]
    return [
        f"{text!r}: {error.message}" for error in Draft202012Validator(schema).iter_errors(value)
    ]


def run(llm: LLM, seeds: range) -> tuple[int, list[str]]:
    """How many completions end by themselves, and what is wrong with them."""
    schemas = [RandomSchema(seed).schema for seed in seeds]
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=MAX_TOKENS, json_schema=schema)
        for seed, schema in zip(seeds, schemas, strict=True)
    ]
    prompts = [PROMPTS[seed % len(PROMPTS)] for seed in seeds]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ended = [
        (schema, output["text"])
        for schema, output in zip(schemas, outputs, strict=True)
        if output["finish_reason"] == "stop"
    ]
    return len(ended), [error for pair in ended for error in errors(*pair)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first schema")
    args = parser.parse_args()
    with LLM(device="cpu") as llm:
        ended, wrong = run(llm, range(args.seed, args.seed + args.count))
    print(*wrong, sep="\n")
    print(f"{ended} of {args.count} completions ended; {len(wrong)} errors in them")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
