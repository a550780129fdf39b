"""Scheduler and block manager under random arrivals, aborts, failures and scarce blocks."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.scheduler_world import ALPHABET, STORY, Draw, World

TOKENS = st.integers(0, ALPHABET - 1)
PROMPTS = st.builds(
    lambda shared, own: STORY[:shared] + own,
    st.integers(0, len(STORY)),
    st.lists(TOKENS, min_size=1, max_size=6),
)


def drawing(data) -> Draw:
    """Tokens that hypothesis chooses."""
    return lambda count: data.draw(st.lists(TOKENS, min_size=count, max_size=count))


class Events(RuleBasedStateMachine):
    """What may happen to an engine, in any order."""

    @initialize(
        num_blocks=st.integers(1, 14),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        caching=st.sampled_from([True, True, False]),
    )
    def build(self, **options):
        self.world = World(**options)

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 12),
        max_len=st.integers(2, 30),
        matched=st.booleans(),
    )
    def arrive(self, prompt, max_tokens, max_len, matched):
        self.world.arrive(prompt, max_tokens, max_len, matched=matched)

    @precondition(lambda self: self.world.alive)
    @rule(data=st.data(), max_tokens=st.integers(1, 12))
    def another_sample(self, data, max_tokens):
        leader = self.world.alive[data.draw(st.sampled_from(sorted(self.world.alive)))]
        prompt = leader.token_ids[: leader.prompt_len]
        self.world.arrive(prompt, max_tokens).leader = leader

    @rule(data=st.data(), ahead=st.lists(st.booleans(), min_size=1, max_size=6))
    def step(self, data, ahead):
        for look_ahead in ahead:
            self.world.step(drawing(data), ahead=look_ahead)

    @precondition(lambda self: self.world.alive)
    @rule(data=st.data(), ahead=st.booleans())
    def abort_while_a_step_runs(self, data, ahead):
        if self.world.in_flight is None:
            self.world.in_flight = self.world.launch(drawing(data))
        self.abort(data)
        self.world.step(drawing(data), ahead=ahead)

    @precondition(lambda self: self.world.alive)
    @rule(data=st.data())
    def abort(self, data):
        self.world.abort(data.draw(st.sampled_from(sorted(self.world.alive))))

    @precondition(lambda self: self.world.alive)
    @rule(data=st.data(), ahead=st.booleans())
    def fail(self, data, ahead):
        self.world.fail(drawing(data), ahead=ahead)

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


def test_invariants_hold_whatever_happens():
    run_state_machine_as_test(
        Events,
        settings=settings(
            max_examples=300,
            stateful_step_count=40,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
