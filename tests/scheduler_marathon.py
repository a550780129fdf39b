"""Many random scheduler steps, most of them planned ahead, under every check of `World`.

    python tests/scheduler_marathon.py --steps 200000

Long prompts, few tokens a step and scarce blocks: what makes a request starve. Ends with an
assertion if a request that could decode waits longer than the longest streak of prefill steps.
"""

import argparse
import random
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository's packages, wherever the script is started
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanovllm.engine.scheduler import MAX_PREFILL_STREAK
from tests.scheduler_world import ALPHABET, World


def random_world(draw: random.Random) -> World:
    return World(
        num_blocks=draw.randint(2, 40),
        block_size=draw.randint(1, 4),
        max_num_seqs=draw.randint(1, 8),
        budget=draw.randint(1, 6),
        caching=draw.random() < 0.5,
    )


def run_world(draw: random.Random, steps: int) -> int:
    """Plays one world; returns its longest wait in steps, of a request that could decode."""
    world, longest = random_world(draw), 0
    ahead = draw.choice([0.0, 0.5, 0.9, 1.0])

    def tokens(count: int) -> list[int]:
        return [draw.randrange(ALPHABET) if draw.random() < 0.1 else 1 for _ in range(count)]

    for _ in range(steps):
        if len(world.alive) < 12 and draw.random() < 0.2:
            # As long as there is room for: then nothing is left for those that decode.
            room = max((len(world.blocks.free) - 1) * world.blocks.block_size, 1)
            length = draw.choice([room, draw.randint(1, 5), draw.randint(1, world.capacity)])
            prompt = [draw.randrange(1, ALPHABET) for _ in range(length)]
            world.arrive(
                prompt,
                max_tokens=draw.randint(1, 40),
                max_len=world.capacity,
                matched=draw.random() < 0.3,
            )
        if world.alive and draw.random() < 0.01:
            world.abort(draw.choice(sorted(world.alive)))
        world.step(tokens, ahead=draw.random() < ahead)
        longest = max([longest, *world.waits.values()])
    return longest


def marathon(steps: int, seed: int = 0, a_world: int = 500) -> int:
    """Runs about that many steps; returns the longest wait."""
    draw = random.Random(seed)
    return max(run_world(draw, a_world) for _ in range(-(-steps // a_world)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    longest = marathon(args.steps, args.seed)
    print(f"{args.steps} steps: none waited longer than {longest} ({MAX_PREFILL_STREAK} allowed)")


if __name__ == "__main__":
    main()
