"""DPO on the CPU, ours beside TRL's DPOTrainer: `python -m benchmarks.dpo_cpu`.

Real pairs (GSM8K solutions, right and wrong; `--pairs hh` for transcripts of several turns), the same policy
on both sides, which is its own reference. The reference's pass over the pairs is part of the whole process
on both sides. In the steady state it is not with us, and not with TRL when it computes the reference before
training (`TRL best`, `precompute_ref_log_probs`); `TRL best, reference in step` has it in every step, which
is TRL's default. TRL's best settings are the fastest found by `--search`; its padding-free batches are
switched off in this version. How it is measured is said in comparison.py, what both sides do in pair_cpu.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import comparison, pair_cpu
from benchmarks.pair_cpu import QUIET, batch_of
from benchmarks.pairs_workload import PairsWorkload

IN_STEP = f"{comparison.BEST}, reference in step"
BEFORE: dict[str, Any] = {"precompute_ref_log_probs": True}

CANDIDATES = {
    "random order, 8": batch_of(8, QUIET),
    **{f"by length, {pairs}": batch_of(pairs) for pairs in (1, 2, 4, 8)},
    **{f"by length, reference before, {pairs}": batch_of(pairs, **BEFORE) for pairs in (1, 2, 4, 8)},
}

BEST = {
    "fp32": {comparison.BEST: batch_of(1, **BEFORE), IN_STEP: batch_of(2)},
    "bf16": {comparison.BEST: batch_of(4, **BEFORE), IN_STEP: batch_of(4)},
}
"""The fastest of `CANDIDATES` by `--search` in fp32, cut off before its last two (reference before, four and
eight pairs; two were slower than one); in bf16 taken over from SFT, not searched."""


def policy_of(made: PairsWorkload, _: Path) -> Path:
    """The artifact itself: plain transformers loads it."""
    return made.policy


PROGRAM = pair_cpu.Program("dpo", policy_of, BEST, CANDIDATES, ("dpo.sampling.num_prompts=0",))

if __name__ == "__main__":
    sys.exit(pair_cpu.main(PROGRAM))
