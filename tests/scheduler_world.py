"""A stand-in for the engine and the model around a scheduler, which knows what is right.

`World` keeps, for every slot of the KV cache, the exact text (all tokens from the first on) that
was last written there, and looks before each step whether the slots that the step reads hold what
they must. After every event it checks all invariants.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanovllm.engine.block_manager import PADDING_BLOCK, BlockManager
from nanovllm.engine.scheduler import MAX_PREFILL_STREAK, Chunk, Scheduler, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

STOP = 0
ALPHABET = 4  # few tokens, so that unrelated prompts share beginnings too
STORY = [1, 2, 3, 1, 1, 2, 2, 3, 3, 1, 3, 2, 1, 2, 3, 3]  # what prompts begin with on purpose

RUBBISH = -1

Draw = Callable[[int], list[int]]  # how many tokens -> the tokens


def always(token: int) -> Draw:
    return lambda count: [token] * count


class Matcher:
    """In the place of xgrammar's: allows every token, and remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def accept_token(self, token: int) -> bool:
        self.told.append(token)
        return True

    def reset(self) -> None:
        self.told.clear()


def sequence(
    request_id: int,
    tokens: list[int],
    max_tokens: int = 8,
    max_len: int = 99,
    *,
    matched: bool = False,
):
    return Sequence(
        request_id=request_id,
        token_ids=list(tokens),
        params=SamplingParams(max_tokens=max_tokens),
        stop_ids=frozenset({STOP}),
        max_len=max_len,
        seed=0,
        matcher=Matcher() if matched else None,
    )


def waits_for_token(seq: Sequence) -> bool:
    """Whether it can go on only once its last token is known."""
    return seq.matcher is not None and seq.num_pending > 0


class Texts:
    """Every text that was ever written, as one number: a trie, so equal numbers are equal texts."""

    EMPTY = 0

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int], int] = {}
        self.tokens: dict[int, list[int]] = {self.EMPTY: []}

    def all_of(self, tokens: list[int]) -> list[int]:
        """The numbers of tokens[:1], tokens[:2] and so on."""
        number, result = self.EMPTY, []
        for token in tokens:
            longer = self.numbers.setdefault((number, token), len(self.tokens))
            self.tokens.setdefault(longer, [*self.tokens[number], token])
            number = longer
            result.append(number)
        return result


@dataclass
class Launched:
    """A step that the model has run, and the tokens that it drew; the scheduler has yet to see."""

    step: Step
    drawn: list[int]


class World:
    """A scheduler whose model writes texts into KV slots and says what it is told to say.

    As on a device, steps run in the order in which they are launched, one of them perhaps before
    the scheduler knows the tokens of the one before; these wait by request index.
    """

    def __init__(
        self, num_blocks: int, block_size: int, max_num_seqs: int, budget: int, caching: bool
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, budget)
        self.texts = Texts()
        self.kv: dict[int, int] = {}  # slot -> number of the text that ends there
        self.last_tokens: dict[int, int] = {}  # request index -> token that was last drawn there
        self.alive: dict[int, Sequence] = {}
        self.in_flight: Launched | None = None
        self.arrivals = 0
        self.launches: list[Step] = []
        self.waiting_for_tokens: set[int] = set()  # as of the last launch
        self.oldest: int | None = None
        self.stalled = 0  # steps that the oldest has waited
        self.waits: Counter[int] = Counter()  # steps that each has waited since it could decode

    @property
    def capacity(self) -> int:
        return self.blocks.num_blocks * self.blocks.block_size

    def arrive(
        self, prompt: list[int], max_tokens: int, max_len: int = 99, *, matched: bool = False
    ) -> Sequence:
        max_len = min(max_len, self.capacity)
        seq = sequence(self.arrivals, prompt[:max_len], max_tokens, max_len, matched=matched)
        self.arrivals += 1
        self.alive[seq.request_id] = seq
        self.scheduler.add(seq)
        self.check()
        return seq

    def abort(self, request_id: int) -> None:
        seq = self.alive.pop(request_id)
        self.scheduler.abort(seq)
        assert seq.finish_reason == "abort"
        assert seq.block_table == []
        self.check()

    def step(self, draw: Draw, *, ahead: bool = False) -> Step | None:
        """What `LLMEngine.step` does; returns the step whose tokens the scheduler has got."""
        current = self.in_flight or self.launch(draw)
        if current is None:
            return None
        self.in_flight = self.launch(draw, ahead=True) if ahead else None
        self.finish(current)
        return current.step

    def launch(self, draw: Draw, *, ahead: bool = False) -> Launched | None:
        """Plans a step, checks it and runs it."""
        self.waiting_for_tokens = {
            seq.request_id for seq in self.alive.values() if waits_for_token(seq)
        }
        step = self.scheduler.schedule(ahead=ahead)
        if step is None:
            assert ahead or not self.alive
            return None
        self.check_step(step)
        self.check_progress(step)
        self.check()
        self.launches.append(step)
        # All tokens are stored before any is read, as in each layer of the model.
        for chunk in step.chunks:
            texts = self.texts.all_of(self.tokens(chunk))
            for position in range(chunk.start, chunk.end):
                self.kv[self.slot(chunk.seq, position)] = texts[position]
        for chunk in step.chunks:
            held = [self.kv.get(self.slot(chunk.seq, i)) for i in range(chunk.end)]
            assert held == self.texts.all_of(self.tokens(chunk))
        sampling = [chunk.seq.request_index for chunk in step.chunks if chunk.needs_sample]
        drawn = draw(len(sampling))
        self.last_tokens.update(zip(sampling, drawn, strict=True))
        return Launched(step, drawn)

    def fail(self, draw: Draw, *, ahead: bool) -> None:
        """Steps stop halfway and leave rubbish in the slots that they were to write."""
        launched = [self.in_flight or self.launch(draw)]
        if ahead:
            launched.append(self.launch(draw, ahead=True))
        for item in launched:
            for chunk in item.step.chunks if item else ():
                self.last_tokens.pop(chunk.seq.request_index, None)
                if chunk.seq.request_index >= 0:
                    for position in range(chunk.start, chunk.end):
                        self.kv[self.slot(chunk.seq, position)] = RUBBISH
        self.in_flight = None
        self.scheduler.restart(self.alive.values())
        self.check()

    def finish(self, launched: Launched) -> None:
        """Hands the drawn tokens back, and checks what the scheduler makes of them."""
        for seq in self.scheduler.update(launched.step, launched.drawn):
            assert seq.block_table == []
            assert seq.finish_reason == ("stop" if seq.token_ids[-1] == STOP else "length")
            assert len(seq.token_ids) <= max(seq.max_len, seq.prompt_len + 1)
            del self.alive[seq.request_id]
        for seq in self.alive.values():
            assert seq.num_generated - seq.num_pending < seq.params.max_tokens
            assert STOP not in seq.token_ids[seq.prompt_len :]
        self.check()

    def drain(self) -> None:
        """Runs everything to its end, in a bounded number of steps."""
        steps_each = (MAX_PREFILL_STREAK + 1) * (self.capacity + 2)
        for _ in range(steps_each * (len(self.alive) + 1)):
            if self.step(always(1)) is None:
                break
        assert not self.alive, "requests are left that never finish"
        assert self.scheduler.is_idle
        assert self.scheduler.schedule() is None
        assert len(self.blocks.free) == self.blocks.num_blocks

    def tokens(self, chunk: Chunk) -> list[int]:
        """The tokens that `chunk` reads to its end; the last may be known on the device only."""
        known = chunk.seq.token_ids[: chunk.end]
        return (
            known
            if len(known) == chunk.end
            else [*known, self.last_tokens[chunk.seq.request_index]]
        )

    def slot(self, seq: Sequence, position: int) -> int:
        size = self.blocks.block_size
        return seq.block_table[position // size] * size + position % size

    def check_step(self, step: Step) -> None:
        scheduler, size = self.scheduler, self.blocks.block_size
        assert step.chunks
        assert len(step.chunks) <= scheduler.max_num_seqs
        assert len({chunk.seq.request_id for chunk in step.chunks}) == len(step.chunks)
        if not step.is_decode:
            num_tokens = sum(chunk.end - chunk.start for chunk in step.chunks)
            assert num_tokens <= scheduler.max_num_batched_tokens
        for chunk in step.chunks:
            seq = chunk.seq
            assert seq.request_index >= 0
            assert 0 <= chunk.start < chunk.end <= len(seq.block_table) * size
            # By now its own token is pending too.
            assert chunk.end <= seq.length - chunk.needs_sample
            assert chunk.needs_sample == (chunk.end == seq.length - chunk.needs_sample)
            assert chunk.end <= len(seq.token_ids) + 1
            if seq.matcher is not None and chunk.needs_sample:
                assert chunk.end == len(seq.token_ids), "its matcher lacks a token"
                assert seq.matcher.told == seq.token_ids[seq.prompt_len :]
            if step.is_decode:
                assert chunk.needs_sample
                assert chunk.end == chunk.start + 1
            written = seq.block_table[chunk.start // size : -(-chunk.end // size)]
            assert all(self.blocks.ref_counts[block] == 1 for block in written)

    def check_progress(self, step: Step) -> None:
        """The oldest is in every step, but for a few in a row that prefill others."""
        oldest = min(self.alive)
        waits = not self.alive[oldest].is_full
        waits = waits and all(chunk.seq.request_id != oldest for chunk in step.chunks)
        waits = waits and oldest not in self.waiting_for_tokens
        self.stalled = self.stalled + 1 if waits and oldest == self.oldest else int(waits)
        self.oldest = oldest
        assert self.stalled <= MAX_PREFILL_STREAK, "the oldest request starves"
        chosen = {chunk.seq.request_id for chunk in step.chunks}
        for seq in self.scheduler.running:
            could = seq.length - seq.num_scheduled == 1 and seq.length < seq.end_len
            could = could and seq.request_id not in self.waiting_for_tokens
            waits = could and seq.request_id not in chosen
            self.waits[seq.request_id] = self.waits[seq.request_id] + 1 if waits else 0
        assert max(self.waits.values()) <= MAX_PREFILL_STREAK, "a running request starves"

    def check(self) -> None:
        self.check_queues()
        self.check_owners()
        self.check_prefixes()

    def check_queues(self) -> None:
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert all(seq.request_index < 0 and not seq.block_table for seq in waiting)
        assert all(seq.finish_reason is None for seq in (*running, *waiting))
        assert len(running) <= self.scheduler.max_num_seqs
        # Nothing is lost, runs are in order of arrival, and nobody waits for a younger one.
        assert [seq.request_id for seq in (*running, *waiting)] == sorted(self.alive)

    def check_owners(self) -> None:
        manager, running = self.blocks, self.scheduler.running
        owners = Counter(block for seq in running for block in set(seq.block_table))
        assert all(len(set(seq.block_table)) == len(seq.block_table) for seq in running)
        assert PADDING_BLOCK not in owners
        assert {block: n for block, n in manager.ref_counts.items() if n} == dict(owners)
        assert set(manager.free) == set(range(1, manager.num_blocks + 1)) - set(owners)
        for seq in running:
            assert seq.num_computed <= len(seq.block_table) * manager.block_size
            assert seq.num_computed <= seq.num_scheduled < seq.length
            # One more than it needs, if a step that was to need it failed.
            assert len(seq.block_table) <= manager.blocks_for(seq.length + 1)
        indices = [seq.request_index for seq in running] + self.scheduler.free_indices
        assert sorted(indices) == list(range(self.scheduler.max_num_seqs))

    def check_prefixes(self) -> None:
        """What the prefix cache believes of a block is what the model has written there."""
        manager, size = self.blocks, self.blocks.block_size
        assert manager.enable_prefix_caching or not manager.prefixes
        texts: dict[int, list[int]] = {}
        for block_id, prefix in manager.prefixes.items():
            ends = [self.kv.get(block_id * size + offset) for offset in range(size)]
            text = self.texts.tokens[ends[-1]]
            assert ends == self.texts.all_of(text)[-size:]
            assert len(text) % size == 0
            assert np.frombuffer(prefix.key[1], np.int32).tolist() == text[-size:]
            # Equal numbers mean equal texts.
            assert texts.setdefault(prefix.number, text) == text
        for key, block_id in manager.by_key.items():
            assert manager.prefixes[block_id].key == key
        for seq in self.scheduler.running:
            assert seq.num_registered <= seq.num_computed // size
            assert manager.prefixes.keys() >= set(seq.block_table[: seq.num_registered])


def drive(world: World, token: int = 1) -> list[Step]:
    """Runs to the end, always drawing `token`; returns the steps."""
    steps = []
    while (step := world.step(always(token))) is not None:
        steps.append(step)
    return steps
