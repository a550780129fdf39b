"""The slow, obvious form of the kernels that draw tokens from logits, in plain torch on any device.

As in `reference`, each function has the name of its fast counterpart. Arithmetic is in float32, and
in float64 where a sum over the vocabulary would lose its tail.

Shapes: N rows of logits, F of them filtered, V tokens of the vocabulary or of this rank's part.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE_TILE = 4096  # tokens; part of the definition of a draw, not a tuning choice
_MASK32 = 0xFFFFFFFF
# Zeros at the end of such a value's float32: ordered keys go without them.
KEY_SHIFTS = {torch.bfloat16: 16, torch.float16: 13}
# Keys of a pass of ``narrow``.
PIVOTS = 16
# Keys of a draw from a part of the vocabulary: a logit is NaN; no token can be drawn.
BROKEN, NOTHING = (1 << 63) - 1, -(1 << 63)


def find_threshold(
    logits: Tensor, temperatures: Tensor, rows: Tensor, top_k: Tensor | None, top_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The least logit that may be drawn, of the rows in `rows`.

    Of the `top_k` likeliest tokens, those stay that are needed to reach probability `top_p` among
    them; the likeliest always stays. Of equals, the lowest tokens stay. NaN is never likely.

    Args:
        logits: ``[N, V]``.
        temperatures: ``[N]`` float32, above 0 where a row is filtered.
        rows, top_k, top_p: ``[F]`` int64, int64 and float32; None: no row has such a limit.

    Returns:
        The threshold, ``[N]`` float32, and the last token that stays of those equal to it, ``[N]``
        int32 (or any after it, if all of them stay); -inf and V in rows that are not filtered.
    """
    vocab = logits.shape[1]
    values = logits[rows].float()
    values = torch.where(values.isnan(), float("-inf"), values)
    top_k = torch.full_like(rows, vocab) if top_k is None else top_k
    top_p = temperatures.new_ones(len(rows)) if top_p is None else top_p
    ordered = values.topk(min(int(top_k.max()), vocab)).values
    ranks = torch.arange(ordered.shape[1], device=ordered.device)
    ordered = ordered.masked_fill(ranks >= top_k[:, None], float("-inf"))
    # In float64: in a sum that loses the vocabulary's tail, enough comes too late. But compared as
    # float32, and not as shares: half of 20 equal tokens are 10, whoever adds them up.
    scores = ordered.double().clamp(max=torch.finfo(torch.float32).max)
    weights = ((scores - scores[:, :1]) / temperatures[rows, None]).exp()
    target = top_p * weights.sum(-1).float()
    before = (weights.cumsum(-1) - weights).float()
    enough = (before >= target[:, None]) & (top_p[:, None] < 1)
    likely = ~enough & ~ordered.isneginf()
    least = ordered.gather(1, (likely.sum(-1, keepdim=True) - 1).clamp(min=0))
    # Of those equal to the least, so many stay as are among the likely.
    stay = (likely & (ordered == least)).sum(-1, keepdim=True)
    tie_end = ((values == least).cumsum(-1) < stay).sum(-1)
    thresholds = logits.new_full((len(logits),), float("-inf"), dtype=torch.float32)
    tie_ends = logits.new_full((len(logits),), vocab, dtype=torch.int32)
    return thresholds.index_copy(0, rows, least[:, 0]), tie_ends.index_copy(0, rows, tie_end.int())


class Search(NamedTuple):
    """What is known of the keys that a search is for, ``[F]`` each; see ``narrow``."""

    bottom: Tensor  # int64, the key is not below, unless even this is not enough
    top: Tensor  # int64, it is below
    above: Tensor  # float32, the sum of the logits from there on


def pivots_of(search: Search) -> Tensor:
    """int64 ``[F, PIVOTS]``."""
    steps = torch.arange(PIVOTS, device=search.top.device)
    return search.bottom[:, None] + (search.top - search.bottom)[:, None] * steps // PIVOTS


def narrow(
    logits: Tensor,
    temperatures: Tensor,
    rows: Tensor,
    peaks: Tensor,
    search: Search,
    gathered: Tensor | None,
    target: Tensor,
    counted: bool,
) -> tuple[Search, Tensor]:
    """A pass of a search for the largest key from which on logits add up to a target.

    PIVOTS keys, of which the first is the lowest, divide what is left of the keys.

    Args:
        logits, temperatures, rows: as in ``find_threshold``.
        peaks: ``[F]`` float32, finite; a logit of that height weighs 1.
        search: after the pass before.
        gathered: ``[R, F, PIVOTS]`` float32, what that pass found in R parts of the vocabulary;
            None: this is the first.
        target: ``[F]`` float32.
        counted: add up ones, else ``exp((logit - peak) / temperature)``.

    Returns:
        The search after the pass before, and ``[F, PIVOTS]`` float32, the sums of the logits from
        each pivot on. NaN and -inf are in none.
    """
    bottom, top, above = search
    if gathered is not None:
        pivots = torch.cat([pivots_of(search), top[:, None]], 1)
        sums = torch.cat([gathered.double().sum(0).float(), above[:, None]], 1)
        # The last pivot that is enough; beyond the last of all is the top.
        last = (sums[:, :-1] >= target[:, None]).sum(1, keepdim=True).clamp(min=1) - 1
        bottom, top = pivots.gather(1, last)[:, 0], pivots.gather(1, last + 1)[:, 0]
        search = Search(bottom, top, sums.gather(1, last + 1)[:, 0])
    values = logits[rows].float()
    values = torch.where(values.isnan(), float("-inf"), values)
    limit = torch.finfo(torch.float32).max
    scores = values.double().clamp(-limit, limit) - peaks[:, None]
    weights = (scores / temperatures[rows, None]).exp() if not counted else torch.ones_like(scores)
    own = key_of(values, logits.dtype)
    each = [(weights * (own >= key[:, None])).sum(1) for key in pivots_of(search).t()]
    return search, torch.stack(each, 1).float()


def collect(
    logits: Tensor, rows: Tensor, threshold: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """The logits that stay in some rows, in the order of their tokens.

    Args:
        logits, rows, threshold: see ``find_threshold``.
        count: at most so many stay.

    Returns:
        Values ``[F, count]`` float32 and tokens ``[F, count]`` int32, filled up with -inf and -1.
    """
    values = logits[rows].float()
    least, end = (x[rows, None] for x in threshold)
    tokens = torch.arange(values.shape[1], device=logits.device, dtype=torch.int32)
    stays = (values > least) | ((values == least) & (tokens <= end))
    stays &= values > float("-inf")
    place = torch.where(stays, stays.cumsum(1) - 1, count)
    kept = values.new_full((len(rows), count + 1), float("-inf"))
    kept.scatter_(1, place, values)
    found = kept.new_full(kept.shape, -1, dtype=torch.int32)
    found.scatter_(1, place, tokens.expand(values.shape))
    return kept[:, :count].contiguous(), found[:, :count].contiguous()


def tie_end(logits: Tensor, rows: Tensor, values: Tensor, stay: Tensor) -> Tensor:
    """The last of the first `stay` tokens whose logits equal a value, ``[F]`` int32; -1 for none.

    Of logits ``[N, V]``; `rows`, `values` and `stay` are ``[F]``, int64, float32 and int32.
    """
    ties = logits[rows].float() == values[:, None]
    wanted = ties & (ties.cumsum(1) <= stay[:, None])
    tokens = torch.arange(logits.shape[1] + 1, device=logits.device, dtype=torch.int32) - 1
    return torch.where(torch.nn.functional.pad(wanted, (1, 0)), tokens, -1).amax(1)


def key_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 that order float32 values of a narrower dtype as they are ordered, without gaps."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes 0 of -0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() >> KEY_SHIFTS.get(dtype, 0)


def value_of(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 values of keys."""
    shift = KEY_SHIFTS.get(dtype, 0)
    bits = keys << shift
    kept = (0x7FFFFFFF >> shift) << shift
    return torch.where(keys < 0, bits ^ kept, bits).int().view(torch.float32)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    steps: Tensor,
    threshold: tuple[Tensor, Tensor] | None = None,
    part: tuple[int, int] | None = None,
) -> Tensor:
    """Draw one token per row from ``softmax(logits / temperature)``.

    Args:
        logits: ``[N, V]``, any float dtype; -inf excludes a token.
        temperatures: ``[N]`` float32; 0 takes the most likely token (of equals, the lowest).
        seeds, steps: ``[N]`` int64, the request's seed and which of its tokens this is.
        threshold: of each row, see ``find_threshold``; None: all its tokens may be drawn.
        part: the logits are those of a part of the vocabulary, whole tiles of it: its first token,
            and the size of the vocabulary.

    Returns:
        ``[N]`` int64; -1 for a row that has a NaN, or nothing but -inf. Of a part: keys; the
        largest of all parts' keys says what is drawn, see ``token_of``.

    A row's draw depends on its own logits, temperature, seed and step only, never on the batch.

    The Gumbel-max trick: ``argmax(score - log(E))`` with independent exponential E draws index i
    with probability proportional to ``exp(score_i)`` (Maddison et al., 2014, arXiv:1411.0030). It
    draws a tile of SAMPLE_TILE tokens by the tiles' log-sum-exp, and then a token of that tile. The
    product of both probabilities is the softmax's, without the noise of any other tile.
    """
    first_token, vocab = part or (0, logits.shape[1])
    first_tile, all_tiles = first_token // SAMPLE_TILE, -(-vocab // SAMPLE_TILE)
    broken = logits.isnan().any(1)
    if threshold is not None:
        least, tie_end = (x[:, None] for x in threshold)
        among = torch.arange(logits.shape[1], device=logits.device) <= tie_end
        stays = (logits > least) | ((logits == least) & among)
        logits = logits.masked_fill(~stays, float("-inf"))
    num_tiles = max(-(-logits.shape[1] // SAMPLE_TILE), 1)  # a part may have no token at all
    warm = temperatures[:, None] > 0
    scores = logits.float() * (1 / torch.where(warm, temperatures[:, None], 1.0))
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    padding = num_tiles * SAMPLE_TILE - logits.shape[1]
    tiles = torch.nn.functional.pad(scores, (0, padding), value=float("-inf"))
    tiles = tiles.unflatten(1, (num_tiles, SAMPLE_TILE))

    def draw(scores: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        noise = -exponential(random_bits(seeds[:, None], steps[:, None], index)).log()
        return torch.where(warm, scores + noise, scores).max(-1, keepdim=True)

    # Tiles are numbered after the last token, so that no noise is used twice.
    index = all_tiles * SAMPLE_TILE + first_tile + torch.arange(num_tiles, device=logits.device)
    score, tile = draw(torch.where(warm, tiles.logsumexp(-1), tiles.amax(-1)), index)
    first = first_token + tile * SAMPLE_TILE
    chosen = tiles.take_along_dim(tile[:, :, None], 1).squeeze(1)
    _, place = draw(chosen, first + torch.arange(SAMPLE_TILE, device=logits.device))
    token = first + place
    # The score in order, then the token, the lowest first.
    keys = ((key_of(score, torch.float32) << 32) | (_MASK32 - token)).squeeze(1)
    keys = torch.where(score.squeeze(1).isneginf(), NOTHING, keys)
    keys = torch.where(broken, BROKEN, keys)
    return token_of(keys) if part is None else keys


def token_of(keys: Tensor) -> Tensor:
    """What is drawn by the largest keys of ``sample`` of parts, int64 ``[N]``."""
    return torch.where((keys == BROKEN) | (keys == NOTHING), -1, _MASK32 - (keys & _MASK32))


def random_bits(seed: Tensor, step: Tensor, index: Tensor) -> Tensor:
    """32 random bits (as int64) for every (seed, step, index), by a counter-based hash.

    Seed and step give two 32-bit keys; the index is hashed with one added before the first
    multiplication and the other after it. The hash is lowbias32 (Chris Wellons, "Prospecting for
    Hash Functions", nullprogram.com/blog/2018/07/31); a counter instead of a state is the idea of
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    low, high = seed & _MASK32, (seed >> 32) & _MASK32
    step = step & _MASK32
    key0 = _lowbias32(_lowbias32(_lowbias32(low) + high) + step)
    key1 = _lowbias32(_lowbias32(_lowbias32(step ^ 0x9E3779B9) + low) + high)
    return _lowbias32(index + key0, key1)


def exponential(bits: Tensor) -> Tensor:
    """A standard exponential variate (float32, above 0) for every 32 random bits.

    ``E = -log(1 - u)`` with ``u = (bits + 1/2) / 2^32``. Small E wins a draw, so its tail has the
    full granularity of u: below 1/64, where 1 - u would lose bits, a series takes over.
    """
    u = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3)))
    return torch.where(u < 1 / 64, series, -(1 - u).log())


def _lowbias32(x: Tensor, key: Tensor | int = 0) -> Tensor:
    x = x & _MASK32
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D + key) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)
