"""Random calls of engines, mixed with faults, interrupts and threads, and what they must give.

    calls = RandomCalls(seed=1, device="cpu", parts=["calls", "faults"])
    calls.one()
    assert not calls.problems

Two engines live on, one of them short of KV blocks and pipelined; others come and go. Greedy
requests whose tokens transformers predicted, the canaries, run all the time. After an error or an
interrupt an engine must go on with the right tokens, or say that it has exited; then it is
replaced.
"""

import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.tiny import CHECKPOINT_DIR, PROMPTS
from tests.checkpoints import greedy
from tests.interrupts import Interrupt, InterruptAt
from tests.thread_rounds import run_all

# Interrupts come at lines of the engine, not of the model, of which there are many more.
ENGINE = str(Path(nanovllm.__file__).parent / "engine")
PARTS = ("calls", "faults", "engines", "interrupts", "threads")
CANARY_TOKENS = 24
LIVING: tuple[dict[str, Any], ...] = (
    {"max_num_seqs": 8, "num_kvcache_blocks": 100},
    {"num_kvcache_blocks": 9, "enable_pipeline": True, "pipeline_mode": "microbatch"},
)
BAD_CALLS: tuple[Callable[[LLM], object], ...] = (
    lambda engine: engine.generate([[]], use_tqdm=False),
    lambda engine: engine.generate([[10**9]], use_tqdm=False),
    lambda engine: engine.generate(["Once", [1] * 10_000], use_tqdm=False),
    lambda engine: engine.generate("Once", temperature=-1, use_tqdm=False),
    lambda engine: engine.generate(["Once"], [SamplingParams()] * 2, use_tqdm=False),
    lambda engine: engine.add_request(None),  # type: ignore[arg-type]
    lambda engine: engine.add_request("Once", no_such_option=1),
    lambda engine: engine.abort(10**9),
)


class Fault(Exception):
    """Raised inside a step, as memory or a kernel may fail."""


def started(options: dict[str, Any]) -> LLM:
    """An engine with room for the tokens of its longest request with penalties.

    It keeps what it needed once, so a later one would look like a leak.
    """
    engine = LLM(**options)
    longest = [5] * (options["max_model_len"] - 1)
    engine.generate([longest], presence_penalty=1, max_tokens=1, use_tqdm=False)
    return engine


class Driven:
    """An engine, and what it owes us: by request id, the tokens that must come; None: any."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.owed: dict[int, list[int] | None] = {}
        self.unsure = False  # an interrupted add_request may have queued something
        self.engine = started(options)

    def replace(self) -> None:
        """A new engine instead of one that has exited, whose requests are gone."""
        self.engine.exit()
        self.owed, self.unsure = {}, False
        self.engine = started(self.options)

    def blocks_in_use(self) -> int:
        blocks = self.engine.scheduler.blocks
        return int(blocks.num_blocks - len(blocks.free))


class RandomCalls:
    """Random calls out of the given parts; `problems` says what went wrong."""

    def __init__(self, seed: int, device: str, parts: Sequence[str]) -> None:
        self.rng = random.Random(seed)
        self.base = {"device": device, "dtype": "float32", "kvcache_block_size": 16}
        self.base |= {"max_model_len": 96, "max_num_batched_tokens": 64}
        self.problems: list[str] = []
        self.count = 0
        tokenizer: Any = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
        model = Qwen3ForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=torch.float32).eval()
        self.canaries = [
            (prompt, greedy(model, tokenizer.encode(prompt), CANARY_TOKENS)) for prompt in PROMPTS
        ]
        self.living = [Driven(self.base | options) for options in LIVING]
        named: dict[str, list[Callable[[Driven], None]]] = {
            "calls": [self.generate, self.generate, self.add_and_step, self.bad_call],
            "faults": [self.fault],
            "engines": [self.engine_comes_and_goes],
            "interrupts": [self.interrupt],
            "threads": [self.abort_from_a_thread, self.generate_twice_at_a_time],
        }
        # Engines are seldom made: safetensors 0.8 leaks 56 bytes for each tensor it reads.
        often = {"engines": 1}
        self.actions = [
            action for part in parts for action in named[part] for _ in range(often.get(part, 5))
        ]

    def one(self) -> None:
        """One random call on one of the engines, and then everything that it owes."""
        self.count += 1
        driven, action = self.rng.choice(self.living), self.rng.choice(self.actions)
        for part in (action, self.drain):
            try:
                part(driven)
            except (Fault, Interrupt):
                driven.unsure = True
            except Exception as error:
                if not (isinstance(error, RuntimeError) and re.search("exit|close", str(error))):
                    self.problems.append(f"{action.__name__}: {error!r}")
                driven.replace()
        if used := driven.blocks_in_use():
            self.problems.append(f"{action.__name__}: {used} KV blocks in use when idle")
            driven.replace()

    def canary(self) -> tuple[str, SamplingParams, list[int]]:
        prompt, tokens = self.rng.choice(self.canaries)
        count = self.rng.randint(1, CANARY_TOKENS)
        return prompt, SamplingParams(temperature=0, max_tokens=count), tokens[:count]

    def request(self) -> tuple[Any, SamplingParams, list[int] | None]:
        """A canary, or random tokens with random options."""
        rng = self.rng
        if rng.random() < 0.5:
            return self.canary()
        prompt = [rng.randrange(100) for _ in range(rng.choice([1, 5, 16, 17, 60, 80]))]
        params = SamplingParams(
            temperature=rng.choice([0, 0.5, 2]),
            top_k=rng.choice([-1, 1, 5]),
            min_p=rng.choice([0, 0.1]),
            presence_penalty=rng.choice([0, 1]),
            repetition_penalty=rng.choice([1, 1.2]),
            logit_bias=rng.choice([None, {5: -1, 6: 2}]),
            max_tokens=rng.choice([1, 3, 40]),
            ignore_eos=rng.random() < 0.5,
            seed=rng.choice([None, 1]),
            logprobs=rng.choice([None, None, 0, 5]),
            prompt_logprobs=rng.choice([None, None, 0, 5]),
        )
        return prompt, params, None

    def check(self, expected: list[int] | None, output: Any) -> None:
        tokens = output["token_ids"]
        right = expected is None or tokens == expected
        if output["finish_reason"] == "abort":
            right = expected is None or tokens == expected[: len(tokens)]
        if not right:
            self.problems.append(f"a canary said {tokens} instead of {expected}")
        scores = output["logprobs"]
        if scores is not None and [next(iter(place)) for place in scores] != tokens:
            self.problems.append(f"{tokens} have other tokens' log-probabilities: {scores}")

    def generate(self, driven: Driven) -> None:
        requests = [self.request() for _ in range(self.rng.randint(1, 12))]
        prompts, params, expected = zip(*requests, strict=True)
        if self.rng.random() < 0.5:
            outputs = driven.engine.generate(list(prompts), list(params), use_tqdm=False)
        else:
            stream = driven.engine.stream(list(prompts), list(params))
            outputs = sorted(stream, key=itemgetter("index"))
        if len(outputs) != len(requests):
            self.problems.append(f"generate: {len(outputs)} outputs of {len(requests)} requests")
        for tokens, output in zip(expected, outputs, strict=False):
            self.check(tokens, output)

    def add_and_step(self, driven: Driven) -> None:
        for _ in range(self.rng.randint(1, 12)):
            prompt, params, tokens = self.request()
            driven.owed[driven.engine.add_request(prompt, params)] = tokens
            for _ in range(self.rng.choice([0, 0, 1, 5])):
                self.step(driven)
            if driven.owed and self.rng.random() < 0.2:
                victim = self.rng.choice(list(driven.owed))
                del driven.owed[victim]  # first, for an interrupt within the call
                driven.engine.abort(victim)

    def step(self, driven: Driven) -> None:
        for output in driven.engine.step():
            if output["request_id"] in driven.owed:
                self.check(driven.owed.pop(output["request_id"]), output)
            elif output["finish_reason"] != "abort" and not driven.unsure:
                self.problems.append(f"an output that nobody waits for: {output}")

    def drain(self, driven: Driven) -> None:
        for _ in range(3_000):
            if driven.engine.is_finished():
                break
            self.step(driven)
        else:
            self.problems.append("an engine that never is idle")
            driven.replace()
            return
        if driven.owed:
            self.problems.append(f"requests were lost: {driven.owed}")
        driven.owed, driven.unsure = {}, False

    def bad_call(self, driven: Driven) -> None:
        call = self.rng.choice(BAD_CALLS)
        try:
            call(driven.engine)
        except (TypeError, ValueError, KeyError):
            return
        self.problems.append(f"bad call number {BAD_CALLS.index(call)} was taken")

    def fault(self, driven: Driven) -> None:
        runner, name = driven.engine.model_runner, self.rng.choice(["launch", "collect"])
        original, left = getattr(runner, name), iter(range(self.rng.randint(0, 12)))

        def fails_once(*args: Any) -> Any:
            if next(left, None) is None:
                delattr(runner, name)
                raise Fault
            return original(*args)

        setattr(runner, name, fails_once)
        try:
            self.rng.choice([self.generate, self.add_and_step])(driven)
        finally:
            vars(runner).pop(name, None)

    def engine_comes_and_goes(self, driven: Driven) -> None:
        options = {
            "num_kvcache_blocks": self.rng.choice([7, 20]),
            "async_scheduling": self.rng.random() < 0.5,
            "enable_prefix_caching": self.rng.random() < 0.5,
        }
        visitor = Driven(self.base | options)
        self.rng.choice([self.generate, self.add_and_step])(visitor)
        visitor.engine.exit()
        visitor.engine.exit()

    def interrupt(self, driven: Driven) -> None:
        with InterruptAt(self.rng.randint(1, 3000), [ENGINE]):
            self.rng.choice([self.generate, self.add_and_step, self.drain])(driven)

    def abort_from_a_thread(self, driven: Driven) -> None:
        first = driven.engine.add_request("Once", max_tokens=1)
        driven.owed[first] = None
        victims = self.rng.sample(range(first + 1, first + 13), 4)

        def abort() -> None:
            for victim in victims:
                with suppress(KeyError):  # there may be fewer requests
                    driven.engine.abort(victim)
                time.sleep(0.005)

        run_all(abort, lambda: self.generate(driven))

    def generate_twice_at_a_time(self, driven: Driven) -> None:
        run_all(lambda: self.generate(driven), lambda: self.generate(driven))

    def exit(self) -> None:
        """Ends the engines that live on."""
        for driven in self.living:
            driven.engine.exit()
