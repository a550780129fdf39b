"""Token ids that only the device knows: the kernel and its reference."""

import torch

from nanovllm.kernels import reference, tokens
from tests.kernels.cases import DEVICE


def test_resolve_tokens_replaces_what_only_the_device_knows():
    last_tokens = torch.randint(-1, 1000, (300,), device=DEVICE)
    last_tokens[::5] = -1  # nothing could be drawn there
    for count in (1, 7, 300):
        input_ids = torch.randint(-300, 300, (count,), dtype=torch.int32, device=DEVICE)
        expected = [max(int(last_tokens[-1 - i]), 0) if i < 0 else i for i in input_ids.tolist()]
        assert reference.resolve_tokens(input_ids, last_tokens).tolist() == expected
        assert tokens.resolve_tokens(input_ids, last_tokens).tolist() == expected
