"""What a tiny checkpoint says, and how sure it is of it.

    python -m tools.train_tiny.report [DIR]

Completes the standard prompts greedily with transformers, one token at a time, and measures the
*margin* at every step: the best logit minus the second best. Where the margin is wide, rounding
cannot change the text, so a CPU in float32 and a GPU in bfloat16 must write the same words. That
is also tried out: the report repeats every completion in bfloat16 arithmetic and compares.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from nanovllm.tiny import CHECKPOINT_DIR, PROMPTS


@dataclass(frozen=True)
class Completion:
    """One greedy completion. `margin` is the smallest met on the way, in logits."""

    prompt: str
    text: str
    tokens: int
    ended: bool
    margin: float


@torch.inference_mode()
def complete(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int = 200
) -> Completion:
    """Complete `prompt` greedily until EOS or `limit` new tokens, in the model's own dtype."""
    ids: list[int] = tokenizer.encode(prompt)
    start, margin, ended = len(ids), float("inf"), False
    cache, fresh = None, ids
    while not ended and len(ids) - start < limit:
        output = model(input_ids=torch.tensor([fresh]), past_key_values=cache, use_cache=True)
        logits = output.logits[0, -1]  # [vocab]
        best, second = logits.float().topk(2).values.tolist()
        margin = min(margin, best - second)
        cache, fresh = output.past_key_values, [int(logits.argmax())]
        ids = ids + fresh
        ended = ids[-1] == tokenizer.eos_token_id
    text = str(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return Completion(prompt, text, len(ids) - start, ended, margin)


@dataclass(frozen=True)
class Report:
    """Greedy completions of the standard prompts, and how many bfloat16 arithmetic repeats."""

    completions: tuple[Completion, ...]
    same_in_bfloat16: int
    parameters: int

    @property
    def margin(self) -> float:
        """The smallest margin of all completions, in logits."""
        return min(completion.margin for completion in self.completions)

    def __str__(self) -> str:
        lines = [
            f"{c.prompt!r}: {c.tokens} tokens, {'EOS' if c.ended else 'no EOS'}, "
            f"margin {c.margin:.2f}\n    {c.prompt}{c.text}"
            for c in self.completions
        ]
        count = len(self.completions)
        lines.append(
            f"{self.parameters:,} parameters; smallest margin {self.margin:.3f}; "
            f"{self.same_in_bfloat16} of {count} texts the same in bfloat16"
        )
        return "\n".join(lines)


def report(directory: Path) -> Report:
    """Loads the checkpoint (bfloat16 weights) in `directory` and runs the standard prompts."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = Qwen3ForCausalLM.from_pretrained(directory).float().eval()
    exact = tuple(complete(model, tokenizer, prompt) for prompt in PROMPTS)
    model.to(torch.bfloat16)  # loses nothing: the weights are bfloat16 values already
    rounded = (complete(model, tokenizer, prompt) for prompt in PROMPTS)
    same = sum(a.text == b.text for a, b in zip(exact, rounded, strict=True))
    return Report(exact, same, sum(parameter.numel() for parameter in model.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete the standard prompts with a checkpoint.")
    parser.add_argument("directory", nargs="?", type=Path, default=CHECKPOINT_DIR)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small a model only waits for its threads, above all on a busy CPU
    print(report(arguments.directory))


if __name__ == "__main__":
    main()
