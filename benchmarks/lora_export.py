"""LoRA on a pretrained model in a half dtype, exported seed after seed: `python -m benchmarks.lora_export`.

Runs sft with adapters on the first rows of a file as a user would, once per seed, and reads the manifests:
was the policy exported, how far is it from the live model, how noisy is that model itself. Exit status 1 when
a seed was not exported. Writes `results/lora_export.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ChildFailed, run_measured, table, write_results
from common.artifacts import read_manifest

FIGURES = (
    "largest_logit_difference",
    "typical_logit_difference",
    "typical_logit_noise",
    "mean_kl",
    "largest_merge_difference",
    "largest_logit_difference_fp32",
)


def main() -> int:
    """Run every seed, print a table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_export")
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained model")
    parser.add_argument("--data", type=Path, required=True, help="rows, for example GSM8K's train.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    parser.add_argument("overrides", nargs="*", help="further settings of the run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora_export_") as temporary:
        folder = Path(temporary)
        rows = folder / "rows.jsonl"
        with open(arguments.data, encoding="utf-8") as data:
            rows.write_text("".join(line for _, line in zip(range(arguments.rows), data, strict=False)))
        common = [
            "model=lora", f"model.path={arguments.model.resolve()}", f"sft.data.path={rows}",
            "sft.train.global_batch_size=8", "sft.train.micro_batch_size=2", "sft.data.eval_fraction=0",
            f"sft.train.max_steps={arguments.steps}", *arguments.overrides,
        ]  # fmt: skip
        runs = [run(folder, seed, common) for seed in arguments.seeds]
    print(table(("seed", "exported", *FIGURES, "seconds"), [_row(seen) for seen in runs]))
    exported = sum(seen["exported"] for seen in runs)
    print(f"exported: {exported} of {len(runs)}")
    print(
        f"written: {write_results('lora_export', {'settings': common, 'runs': runs}, to=arguments.results)}"
    )
    return 0 if exported == len(runs) else 1


def run(folder: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One seed, and what its manifest says."""
    name = f"seed{seed}"
    command = [
        sys.executable, "-m", "pipeline", "run", "steps=[sft]", "model.dtype=bf16", f"seed={seed}",
        f"run_name={name}", f"output_dir={folder}", "tracking=off", *overrides,
    ]  # fmt: skip
    seconds, log = 0.0, folder / f"{name}.txt"
    try:
        usage, _ = run_measured(command, log=log)
        seconds = usage.wall_seconds
    except ChildFailed as failed:
        print(failed)
    step = folder / name / "sft"
    ends = [step / "export", step / "export.unverified"]
    found = [end for end in ends if (end / "manifest.json").exists()]
    details = read_manifest(found[0]).details if found else {}
    seen = {"seed": seed, "exported": found[:1] == ends[:1], "seconds": seconds}
    print(f"seed {seed}: {'exported' if seen['exported'] else 'NOT exported'}, {seconds:.0f} s", flush=True)
    return {**seen, **{figure: details.get(figure) for figure in FIGURES}}


def _row(seen: dict[str, Any]) -> list[object]:
    figures = ["" if seen[figure] is None else f"{seen[figure]:.2g}" for figure in FIGURES]
    return [seen["seed"], "yes" if seen["exported"] else "no", *figures, f"{seen['seconds']:.0f}"]


if __name__ == "__main__":
    sys.exit(main())
