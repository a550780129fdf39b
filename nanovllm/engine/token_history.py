"""The tokens of running requests on the device, for those whose draws depend on them.

The host does not know the newest tokens yet when it launches a step. So all tokens of a request
are written once, when its first token since its admission is drawn and the host knows all others;
from then on the device appends what it draws.
"""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.utils.device import to_device


class TokenHistory:
    """A row for each of `max_num_seqs` requests, by request_index; rows grow with the longest."""

    def __init__(self, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        self.tokens = torch.empty(max_num_seqs, 0, dtype=torch.int32, device=device)
        self.max_model_len = max_model_len

    def reserve(self, length: int) -> None:
        """Makes room for so many tokens in every row."""
        width = self.tokens.shape[1]
        if length > width:
            wanted = max(length, min(2 * width, self.max_model_len))
            self.tokens = torch.nn.functional.pad(self.tokens, (0, wanted - width))

    def write(self, row: int, tokens: np.ndarray) -> None:
        """The first tokens of a row."""
        self.tokens[row, : len(tokens)] = to_device(tokens, self.tokens.device)

    def read(self, rows: torch.Tensor, length: int) -> torch.Tensor:
        """The first tokens of some rows, int32 [P, length]; none of them need be that long."""
        return self.tokens[:, :length][rows]

    def append(self, rows: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor) -> None:
        """One token for each of some rows, which have `lengths` [P]."""
        self.tokens[rows, lengths] = tokens.int()
