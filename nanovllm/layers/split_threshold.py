"""Top-k and top-p where every rank has a part of the vocabulary, and no rank a row of logits.

- With a small top-k, every rank gives its own k largest logits to all, and all find the threshold
  among these candidates, as one rank finds it among a whole row.
- Else the least logit that may be drawn is searched for among ordered keys of floats, as in
  `kernels.top_k_top_p`, by how many logits, or how much probability, lie from some keys on. Ranks
  exchange these sums after each pass, so it is exact however flat a distribution is, and takes no
  more for a large k.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.kernels.reference_sampling import KEY_SHIFTS, PIVOTS, Search, key_of, value_of
from nanovllm.layers.parallel import ParallelGroup

# The largest top-k for which ranks exchange candidates.
MOST_CANDIDATES = 64
_MAX = torch.finfo(torch.float32).max


class Limits(NamedTuple):
    """Top-k and top-p of F rows."""

    rows: Tensor  # int64 [F], which rows
    top_k: Tensor | None  # int64 [F], the vocabulary's size where there is no limit; None: nowhere
    top_p: Tensor | None  # float32 [F], 1 where there is no limit; None: nowhere

    def part(self, items: slice) -> Limits:
        k, p = (None if limit is None else limit[items] for limit in (self.top_k, self.top_p))
        return Limits(self.rows[items], k, p)


def find_threshold(
    logits: Tensor, temperatures: Tensor, limits: Limits, num_few: int, group: ParallelGroup
) -> tuple[Tensor, Tensor]:
    """As `kernels.find_threshold`, where the logits are this rank's, [N, part of V].

    In the first `num_few` of the limited rows, top_k is at most MOST_CANDIDATES. The thresholds are
    the same on all ranks; of the tokens equal to it the last that stays is counted within the
    rank's part: -1 where none of them does.
    """
    thresholds = logits.new_full((len(logits),), float("-inf"), dtype=torch.float32)
    ends = torch.full_like(thresholds, logits.shape[1], dtype=torch.int32)
    for items, find in ((slice(num_few), _among_candidates), (slice(num_few, None), _search)):
        part = limits.part(items)
        if len(part.rows):
            threshold, end = find(logits, temperatures, part, group)
            thresholds.index_copy_(0, part.rows, threshold)
            ends.index_copy_(0, part.rows, end)
    return thresholds, ends


def _among_candidates(
    logits: Tensor, temperatures: Tensor, limits: Limits, group: ParallelGroup
) -> tuple[Tensor, Tensor]:
    """Of rows with a small top-k; [F] each."""
    rows, top_k, top_p = limits
    if logits.shape[1] > 0:
        own = kernels.find_threshold(logits, temperatures, rows, top_k, None)
    else:
        own = torch.zeros_like(temperatures), torch.zeros_like(temperatures, dtype=torch.int32)
    values, tokens = kernels.collect(logits, rows, own, MOST_CANDIDATES)
    # Rank by rank, and so in the order of tokens.
    candidates = group.gather(values).transpose(0, 1).flatten(1)
    items = torch.arange(len(rows), device=rows.device)
    threshold, last = kernels.find_threshold(candidates, temperatures[rows], items, top_k, top_p)
    place = torch.arange(MOST_CANDIDATES, device=rows.device) + group.rank * MOST_CANDIDATES
    ties = (values == threshold[:, None]) & (place <= last[:, None])
    return threshold, torch.where(ties, tokens, -1).amax(1)


def _search(
    logits: Tensor, temperatures: Tensor, limits: Limits, group: ParallelGroup
) -> tuple[Tensor, Tensor]:
    """Of any rows; [F] each."""
    rows, top_k, top_p = limits
    search = _Searcher(logits, temperatures, rows, group)
    bottom, top = search.bottom, search.top
    stay = torch.full_like(search.peaks, 1 << 30)  # of those equal to the threshold
    if top_k is not None:
        bottom, above = search.run(top_k.float(), bottom, top, counted=True)
        stay = top_k - above
    if top_p is not None:
        least = bottom
        number_from, number_beyond = search.sums(least, counted=True)
        _, beyond = search.sums(least, counted=False)
        ties = torch.minimum(stay, number_from - number_beyond)
        target = top_p * (beyond + ties * search.weight(least))
        found, above = search.run(target, least, top, counted=False)
        needed = ((target - above) / search.weight(found).clamp(min=1e-37)).ceil().clamp(min=1)
        limited = top_p < 1
        stay = torch.where(limited & (found > least), needed, stay)
        stay = torch.where(limited & (found == least), torch.minimum(needed, ties), stay)
        bottom = torch.where(limited, found, least)
    return search.place(bottom, stay)


class _Searcher:
    """Searches rows for the keys from which on logits add up to something."""

    def __init__(
        self, logits: Tensor, temperatures: Tensor, rows: Tensor, group: ParallelGroup
    ) -> None:
        self.logits, self.temperatures, self.rows, self.group = logits, temperatures, rows, group
        self.dtype = logits.dtype
        if logits.shape[1] > 0:
            # Of a row with NaN nothing is drawn, whatever its threshold.
            own = logits.amax(1)[rows].double().nan_to_num(nan=0.0)
        else:
            own = rows.new_full(rows.shape, float("-inf"), dtype=torch.float64)
        highest = group.gather(own).amax(0).float()
        self.peaks = highest.clamp(-_MAX, _MAX)  # float32 [F]
        # int64 [F]: the keys of the least finite logit, and behind that of the highest.
        self.bottom = key_of(self.peaks.new_full(highest.shape, -_MAX), self.dtype)
        self.top = torch.maximum(key_of(highest, self.dtype) + 1, self.bottom)

    def sums(self, keys: Tensor, *, counted: bool) -> tuple[Tensor, Tensor]:
        """Number or weight of the logits from each key [F] on, and of those beyond it, [F] each."""
        everyone = self.group.gather(self._own_sums(keys, counted))
        total = everyone.double().sum(0).float()  # in rank order, on every rank
        return total[:, 0], total[:, 1]

    def weight(self, keys: Tensor) -> Tensor:
        """What a logit of each key [F] weighs."""
        values = value_of(keys, self.dtype).double().clamp(-_MAX, _MAX)
        return ((values - self.peaks) / self.temperatures[self.rows]).exp().float()

    def run(
        self, target: Tensor, bottom: Tensor, top: Tensor, *, counted: bool
    ) -> tuple[Tensor, Tensor]:
        """The largest keys from `bottom` to `top` - 1 that reach a target, and what is above them.

        Where none does, `bottom`.
        """
        search, gathered = Search(bottom, top, torch.zeros_like(target)), None
        bits = 32 - KEY_SHIFTS.get(self.dtype, 0)
        for _ in range(-(-bits // (PIVOTS.bit_length() - 1))):
            search, sums = self._narrow(self.logits, search, gathered, target, counted)
            gathered = self.group.gather(sums)
        no_logits = self.logits[:, :0]  # only what the last pass found is left to see
        search, _ = self._narrow(no_logits, search, gathered, target, counted)
        return search.bottom, search.above

    def _narrow(self, logits: Tensor, *state: Any) -> tuple[Search, Tensor]:
        return kernels.narrow(logits, self.temperatures, self.rows, self.peaks, *state)

    def _own_sums(self, keys: Tensor, counted: bool) -> Tensor:
        """As `sums`, of this rank's logits, [F, 2]."""
        search = Search(keys, keys + PIVOTS, self.peaks)  # so pivots are one apart
        _, sums = self._narrow(self.logits, search, None, self.peaks, counted)
        return sums[:, :2].contiguous()

    def place(self, keys: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
        """Thresholds and the last of their ties; the lowest ranks' ties come first."""
        from_key, beyond = self._own_sums(keys, counted=True).unbind(1)
        counts = from_key - beyond
        # In float64, as ranks exchange values of 8 bytes.
        before = self.group.gather(counts.double())[: self.group.rank].sum(0).float()
        own = torch.minimum((stay - before).clamp(min=0), counts)
        threshold = value_of(keys, self.dtype)
        return threshold, kernels.tie_end(self.logits, self.rows, threshold, own.int())
