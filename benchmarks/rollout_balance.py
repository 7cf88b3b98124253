"""Forward passes of the rank that samples longest, by how prompts are shared out over ranks.

    python -m benchmarks.rollout_balance         seconds; writes results/rollout_balance.json

No network: every response has a length that was drawn before, from a long-tailed distribution (log-normal,
cut at the longest response, with a mean of each prompt's own), and passes are counted. Ways to share out:

static       every R-th prompt, in the order of the iteration
stealing     at every pass, the next prompt goes to a rank with a free slot; ranks know each other's
expected     by the mean lengths of the same prompts an epoch ago, as `step3_ppo/lengths.py` does
both         stealing, the longest by the same means first
first epoch  expected where no prompt has been seen before
known        the same with the lengths that will come: no rule that knows less does better on average
bound        the longest response, or all tokens over all slots, whichever is more
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.measure import machine, table, write_results
from step3_ppo.lengths import shared_out


@dataclass(frozen=True)
class Case:
    """An iteration. between, within: standard deviations of the logarithm of a length, over prompts and over
    responses to one; drift: of a prompt's mean over an epoch of training."""

    prompts: int
    samples: int
    ranks: int
    slots: int
    longest: int = 1024
    median: float = 150.0
    between: float = 0.7
    within: float = 0.5
    drift: float = 0.3


CASES = {
    "128 prompts, 8 samples, 4 ranks": Case(128, 8, 4, 64),
    "128 prompts, 16 samples, 8 ranks": Case(128, 16, 8, 64),
    "1,024 prompts, 8 ranks": Case(1024, 1, 8, 32),
    "128 prompts, 4 samples, 4 ranks": Case(128, 4, 4, 16),
    "512 prompts, 8 samples, 64 ranks": Case(512, 8, 64, 16, longest=2048),
    "128 prompts, 2 ranks": Case(128, 1, 2, 8),
    "128 prompts, 4 samples, 8 ranks, all at once": Case(128, 4, 8, 64),
}


def passes_of(lengths: Sequence[int], slots: int) -> int:
    """Of one rank: a free slot takes the next response, as the decoder's scheduler does (a test compares)."""
    free = [0] * slots
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def of_slowest(lengths: np.ndarray, shares: Sequence[np.ndarray], slots: int) -> int:
    return max(passes_of(lengths[share].ravel().tolist(), slots) for share in shares)


def stolen(lengths: np.ndarray, ranks: int, slots: int) -> int:
    """Passes where the next group goes to the rank whose slot is free first."""
    free = [[0] * slots for _ in range(ranks)]
    for of_group in lengths.tolist():
        own = min(free, key=lambda of_rank: of_rank[0])
        for length in of_group:
            heapq.heapreplace(own, own[0] + length)
    return max(map(max, free))


def drawn(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [prompts, samples]: lengths now, and an epoch ago."""
    rng = np.random.default_rng(seed)
    now = np.log(case.median) + case.between * rng.standard_normal((case.prompts, 1))
    before = now + case.drift * rng.standard_normal(now.shape)
    return tuple(  # type: ignore[return-value]
        np.clip(
            np.exp(mean + case.within * rng.standard_normal((case.prompts, case.samples))), 1, case.longest
        )
        .round()
        .astype(np.int64)
        for mean in (now, before)
    )


def measured(case: Case, seed: int) -> dict[str, int]:
    """Passes of the slowest rank, by way of sharing out."""
    now, before = drawn(case, seed)
    unseen = np.full(case.prompts, np.nan)
    ways = {"expected": before.mean(1), "first epoch": unseen, "known": now.mean(1)}
    static = [np.arange(case.prompts)[rank :: case.ranks] for rank in range(case.ranks)]
    return {
        "static": of_slowest(now, static, case.slots),
        "stealing": stolen(now, case.ranks, case.slots),
        **{
            way: of_slowest(now, shared_out(expected, case.ranks), case.slots)
            for way, expected in ways.items()
        },
        "both": stolen(now[np.argsort(-before.mean(1))], case.ranks, case.slots),
        "bound": max(int(now.max()), -(-int(now.sum()) // (case.ranks * case.slots))),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_balance", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="over which is averaged")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {}
    for name, case in CASES.items():
        found = [measured(case, seed) for seed in range(args.seeds)]
        result[name] = {way: float(np.mean([each[way] for each in found])) for way in found[0]}
    ways = list(next(iter(result.values())))
    rows = [(name, *(round(of_case[way]) for way in ways)) for name, of_case in result.items()]
    print(table(("mean passes of the slowest rank", *ways), rows), flush=True)
    if not args.no_write:
        cases = {name: vars(case) for name, case in CASES.items()}
        write_results(
            "rollout_balance", {"machine": machine(), "seeds": args.seeds, "cases": cases, "passes": result}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
