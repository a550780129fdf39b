"""Requests of the throughput workloads: the same for every engine that is compared.

All ignore the end of a sequence, so that each gives as many tokens as it is to.
"""

from __future__ import annotations

from random import Random

HIGHEST_ID = 150_000

EQUAL = {
    "long": (256, 2048, 128),  # requests, tokens in, tokens out
    "even": (512, 1000, 1000),  # more KV than fits at a time
    "short": (1024, 128, 512),
    "peak": (1024, 440, 72),  # where the pipeline of 8B gains most
    "steady": (2000, 1500, 500),
    "prefill": (80, 2048, 1),  # 8 of them in a step
}
# "W" is nano-vllm's own benchmark, "chat" many short requests and a few long ones.
REQUEST_SETS = ("W", "chat", *EQUAL)
# Of `Config.max_num_seqs`; all others run as many as there are, up to 1,024.
MAX_NUM_SEQS = {"steady": 256}
MAX_MODEL_LEN = 4096

Requests = tuple[list[list[int]], list[int]]


def draw_requests(name: str, first: int | None = None) -> Requests:
    """Prompts as token ids, and the tokens that each is to give: of a whole set, or the first."""
    prompts, outputs = draw_w() if name == "W" else draw_set(name)
    return prompts[:first], outputs[:first]


def within(prompts: list[list[int]], vocab_size: int) -> list[list[int]]:
    """The same prompts for a vocabulary that may be smaller: ids are taken modulo its size."""
    if vocab_size > HIGHEST_ID:
        return prompts
    return [[token % vocab_size for token in prompt] for prompt in prompts]


def draw_w() -> Requests:
    """As nano-vllm's bench.py draws them, in its order."""
    draw = Random(0).randint
    prompts = [[draw(0, 10_000) for _ in range(draw(100, 1024))] for _ in range(256)]
    return prompts, [draw(100, 1024) for _ in range(256)]


def draw_set(name: str) -> Requests:
    """All lengths first, then the ids of prompt after prompt."""
    draw = Random(7)

    def lengths(count: int, spread: float, longest: int) -> list[int]:
        """Around e**4.9 = 134 tokens, log-normal."""
        drawn = (int(draw.lognormvariate(4.9, spread)) for _ in range(count))
        return [min(max(length, 4), longest) for length in drawn]

    if name == "chat":
        inputs, outputs = lengths(1500, 1.0, 2048), lengths(1500, 0.9, 1024)
    else:
        count, length, output = EQUAL[name]
        inputs, outputs = [length] * count, [output] * count
    return [[draw.randint(3, HIGHEST_ID) for _ in range(n)] for n in inputs], outputs
