"""Losses of the first steps of the tiny run, as a text file that every change of numerics changes.

    python -m tests.recipes.golden

writes `golden.txt` anew. A refactor must not need it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from step1_sft.config import SFTJob
from tests.runs import Base, training_lines

FILE = Path(__file__).with_name("golden.txt")


def golden_job(base: Base) -> SFTJob:
    """Two sources, packed rows, fp32 on one thread, checkpoints and evaluations between the steps."""
    return base.job(max_steps=8, eval_every=3, save_every=2)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Base.make(Path(folder))
        lines = training_lines(base.run("golden", golden_job(base)))
    head = "# step  loss  grad_norm, written by: python -m tests.recipes.golden\n"
    FILE.write_text(head + "".join(f"{x['step']}  {x['loss']:.8f}  {x['grad_norm']:.7f}\n" for x in lines))


if __name__ == "__main__":
    main()
