"""Times both forms of top-k and top-p on a GPU, and compares what they keep.

    python -m tests.gpu.time_top_k_top_p

Of each form, microseconds of a call that the host launches ("eager") and of one in a CUDA graph
("graph"): medians of rounds in which the forms take turns. "differ" counts rows in which the two
keep different tokens; both are checked against sorting, to within the rounding of a sum.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from nanovllm.kernels import likely, top_k_top_p
from tests.kernels.cases import check_threshold, within

FORMS = {"likely": likely.find_threshold, "new": top_k_top_p.find_threshold}
VOCAB = 151936
SPREADS = {"flat": 0.6, "peaked": 3.0}


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A replay of five calls in one graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            call()
    return graph.replay


def microseconds(call: Callable[[], object], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls * 1000


def medians(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 == 0 else reversed(calls):
            times[name].append(microseconds(calls[name], repeats))
    return {name: statistics.median(values) for name, values in times.items()}


def case(rows: int, dtype: torch.dtype, limits: str, spread: float) -> tuple:
    """Arguments of both forms: every row is filtered, by top-k 20, top-p 0.9 or both."""
    logits = (torch.randn(rows, VOCAB, device="cuda") * spread).to(dtype)
    top_k = torch.full((rows,), 20, device="cuda") if "k" in limits else None
    top_p = torch.full((rows,), 0.9, device="cuda") if "p" in limits else None
    return logits, torch.ones(rows, device="cuda"), torch.arange(rows, device="cuda"), top_k, top_p


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "microseconds a call")
    print("rows dtype    logits limits | eager likely    new | graph likely    new  ratio | differ")
    for dtype in (torch.bfloat16, torch.float32):
        for rows in args.rows:
            for name, spread in SPREADS.items():
                for limits in ("k", "p", "kp"):
                    inputs = case(rows, dtype, limits, spread)
                    found = {form: find(*inputs) for form, find in FORMS.items()}
                    kept = [within(inputs[0], threshold) for threshold in found.values()]
                    differ = int((kept[0] != kept[1]).any(1).sum())
                    for threshold in found.values():
                        check_threshold(threshold, *inputs, border=4e-6)
                    del kept, found
                    eager = {form: partial(find, *inputs) for form, find in FORMS.items()}
                    graphs = {form: captured(call) for form, call in eager.items()}
                    now = medians(eager, args.rounds, 5)
                    replayed = medians(graphs, args.rounds, 2)
                    old, new = (replayed[form] / 5 for form in FORMS)
                    print(
                        f"{rows:4} {str(dtype)[6:]:8} {name:6} {limits:6} |"
                        f" {now['likely']:12.1f} {now['new']:6.1f} |"
                        f" {old:12.1f} {new:6.1f} {old / new:6.2f} | {differ}",
                        flush=True,
                    )
    print("ratio: old / new in a graph; above 1 the new one is faster")


if __name__ == "__main__":
    main()
