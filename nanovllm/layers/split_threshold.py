"""Top-k and top-p where every rank has a part of the vocabulary, and no rank a row of logits.

- With a small top-k, every rank gives its own k largest logits to all, and all find the threshold
  among these candidates, as one rank finds it among a whole row.
- Else the least logit that may be drawn is searched for among ordered keys of floats, as in
  `kernels.top_k_top_p`: a pass cuts what is left into PIVOTS parts by how many logits, or how much
  probability, lie from each on. Ranks exchange these sums, so it is exact however flat a
  distribution is, and takes no more for a large k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.kernels.reference import KEY_SHIFTS, key_of, value_of
from nanovllm.layers.parallel import ParallelGroup

# The largest top-k for which ranks exchange candidates.
MOST_CANDIDATES = 64
PIVOTS = 16
_NUMBER, _WEIGHT = 0, 1
_MAX = torch.finfo(torch.float32).max


def find_threshold(
    logits: Tensor,
    temperatures: Tensor,
    rows: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    num_few: int,
    group: ParallelGroup,
) -> tuple[Tensor, Tensor]:
    """As `kernels.find_threshold`, where the logits are this rank's, [N, part of V].

    Args:
        num_few: in so many rows, the first of `rows`, top_k is at most MOST_CANDIDATES.

    Returns:
        The same thresholds on all ranks; of the tokens equal to it the last that stays is counted
        within the rank's part: -1 where none of them does.
    """
    thresholds = logits.new_full((len(logits),), float("-inf"), dtype=torch.float32)
    ends = torch.full_like(thresholds, logits.shape[1], dtype=torch.int32)
    for part, find in ((slice(num_few), _among_candidates), (slice(num_few, None), _search)):
        if len(rows[part]):
            k, p = (None if limit is None else limit[part] for limit in (top_k, top_p))
            threshold, end = find(logits, temperatures, rows[part], k, p, group)
            thresholds.index_copy_(0, rows[part], threshold)
            ends.index_copy_(0, rows[part], end)
    return thresholds, ends


def _among_candidates(
    logits: Tensor,
    temperatures: Tensor,
    rows: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    group: ParallelGroup,
) -> tuple[Tensor, Tensor]:
    """Of rows with a small top-k; [F] each."""
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
    logits: Tensor,
    temperatures: Tensor,
    rows: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    group: ParallelGroup,
) -> tuple[Tensor, Tensor]:
    """Of any rows; [F] each."""
    search = _Search(logits, temperatures, rows, group)
    bottom, top = search.bottom, search.top
    stay = torch.full_like(bottom, 1 << 31, dtype=torch.float64)  # of those equal to the threshold
    if top_k is not None:
        bottom, above = search.run(_NUMBER, top_k.double(), bottom, top)
        stay = top_k - above
    if top_p is not None:
        least = bottom
        from_least, beyond = search.sums(torch.stack([least, least + 1], 1)).unbind(1)
        ties = torch.minimum(stay, from_least[:, _NUMBER] - beyond[:, _NUMBER])
        target = top_p * (beyond[:, _WEIGHT] + ties * search.weight(least))
        found, above = search.run(_WEIGHT, target, least, top)
        needed = ((target - above) / search.weight(found).clamp(min=1e-37)).ceil().clamp(min=1)
        limited = top_p < 1
        stay = torch.where(limited & (found > least), needed, stay)
        stay = torch.where(limited & (found == least), torch.minimum(needed, ties), stay)
        bottom = torch.where(limited, found, least)
    return search.place(bottom, stay)


class _Search:
    """Searches rows for the keys from which on logits add up to something.

    Attributes:
        bottom, top: int64 [F], the key of the least finite logit, and that behind the highest.
    """

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
        self.peaks = highest.clamp(-_MAX, _MAX)
        self.bottom = key_of(self.peaks.new_full(highest.shape, -_MAX), self.dtype)
        self.top = torch.maximum(key_of(highest, self.dtype) + 1, self.bottom)

    def sums(self, keys: Tensor) -> Tensor:
        """Number and weight of the logits from each key [F, P] on, [F, P, 2], of all ranks."""
        return self.group.gather(self.own_sums(keys)).double().sum(0)  # in rank order, everywhere

    def own_sums(self, keys: Tensor) -> Tensor:
        """The same of this rank's logits."""
        return kernels.weigh(self.logits, self.temperatures, self.rows, self.peaks, keys)

    def weight(self, keys: Tensor) -> Tensor:
        """What a logit of each key [F] weighs."""
        values = value_of(keys, self.dtype).double().clamp(-_MAX, _MAX)
        return ((values - self.peaks) / self.temperatures[self.rows]).exp()

    def run(self, what: int, target: Tensor, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """The largest keys from `bottom` to `top` - 1 that reach a target, and what is above them.

        Where none does, `bottom`.
        """
        above = torch.zeros_like(target)
        steps = torch.arange(PIVOTS, device=target.device)
        for _ in range(-(-(32 - KEY_SHIFTS.get(self.dtype, 0)) // (PIVOTS.bit_length() - 1))):
            pivots = bottom[:, None] + (top - bottom)[:, None] * steps // PIVOTS
            got = self.sums(pivots)[..., what]
            last = (got >= target[:, None]).sum(1, keepdim=True).clamp(min=1) - 1
            # Beyond the last pivot is the top as it was.
            pivots = torch.cat([pivots, top[:, None]], 1)
            got = torch.cat([got, above[:, None]], 1)
            bottom, top = pivots.gather(1, last)[:, 0], pivots.gather(1, last + 1)[:, 0]
            above = got.gather(1, last + 1)[:, 0]
        return bottom, above

    def place(self, keys: Tensor, stay: Tensor) -> tuple[Tensor, Tensor]:
        """Thresholds and the last of their ties; the lowest ranks' ties come first."""
        from_key, beyond = self.own_sums(torch.stack([keys, keys + 1], 1))[..., _NUMBER].unbind(1)
        counts = (from_key - beyond).double()
        before = self.group.gather(counts)[: self.group.rank].sum(0)
        own = torch.minimum((stay - before).clamp(min=0), counts)
        threshold = value_of(keys, self.dtype)
        return threshold, kernels.tie_end(self.logits, self.rows, threshold, own.int())
