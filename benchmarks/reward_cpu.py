"""The reward model on the CPU, ours beside TRL's RewardTrainer: `python -m benchmarks.reward_cpu`.

Real pairs (GSM8K solutions, right and wrong; `--pairs hh` for transcripts of several turns), the same weights
and the same initial head on both sides. TRL runs in its best setting (see `BEST`; `--search` measures the
candidates) and in its defaults; it has no packing and no padding-free batches for reward models. How it is
measured is said in comparison.py, what both sides do in pair_cpu.py.
"""

from __future__ import annotations

import sys

from benchmarks import comparison, pair_cpu
from benchmarks.pair_cpu import QUIET, batch_of
from benchmarks.pair_sides import initial_reward_model

CANDIDATES = {
    "random order, 8": batch_of(8, QUIET),
    "by length, 1": batch_of(1),
    "by length, 2": batch_of(2),
    "by length, 4": batch_of(4),
    "by length, 8": batch_of(8),
    "by length, 16": batch_of(16),
}

BEST = {"fp32": {comparison.BEST: batch_of(1)}, "bf16": {comparison.BEST: batch_of(4)}}
"""The fastest of `CANDIDATES` by `--search` in fp32; in bf16 taken over from SFT, not searched."""

PROGRAM = pair_cpu.Program("reward", initial_reward_model, BEST, CANDIDATES)

if __name__ == "__main__":
    sys.exit(pair_cpu.main(PROGRAM))
