"""What a tiny checkpoint says, and how sure it is of it.

Completes the standard prompts greedily with transformers, one token at a time, and measures the
*margin* at every step: the best logit minus the second best. Where the margin is wide, rounding
cannot change the text, so a CPU in float32 and a GPU in bfloat16 must write the same words. That
is also tried out: every completion is repeated in bfloat16 arithmetic.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from nanovllm.tiny import PROMPTS


class Completion(NamedTuple):
    """One greedy completion. `margin` is the smallest met on the way, in logits."""

    text: str
    tokens: int
    margin: float


@torch.inference_mode()
def complete(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int = 200
) -> Completion:
    """Complete `prompt` greedily until EOS or `limit` new tokens, in the model's own dtype."""
    fresh: list[int] = tokenizer.encode(prompt)
    new: list[int] = []
    margin, cache = float("inf"), None
    while len(new) < limit and tokenizer.eos_token_id not in new:
        output = model(input_ids=torch.tensor([fresh]), past_key_values=cache, use_cache=True)
        logits = output.logits[0, -1]  # [vocab]
        best, second = logits.float().topk(2).values.tolist()
        margin = min(margin, best - second)
        cache, fresh = output.past_key_values, [int(logits.argmax())]
        new += fresh
    return Completion(str(tokenizer.decode(new, skip_special_tokens=True)), len(new), margin)


def report(directory: Path) -> float:
    """Prints what the checkpoint in `directory` makes of the prompts; returns the least margin."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = Qwen3ForCausalLM.from_pretrained(directory).float().eval()
    exact = [complete(model, tokenizer, prompt) for prompt in PROMPTS]
    model.to(torch.bfloat16)  # loses nothing: the weights are bfloat16 values already
    rounded = [complete(model, tokenizer, prompt) for prompt in PROMPTS]
    for prompt, (text, tokens, margin) in zip(PROMPTS, exact, strict=True):
        print(f"{prompt!r}: {tokens} tokens, margin {margin:.2f}\n    {prompt}{text}")
    same = sum(a.text == b.text for a, b in zip(exact, rounded, strict=True))
    print(f"{same} of {len(PROMPTS)} texts the same in bfloat16")
    return min(completion.margin for completion in exact)
