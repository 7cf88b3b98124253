"""`pipeline plan`'s memory estimate beside what a rank really took, on the CPU.

    python -m benchmarks.memory_plan            about ten minutes; writes results/memory_plan.json

Runs a few steps of SFT at one rank for three shapes and ZeRO 1, 2 and 3, each in a process of its own, and
reads its resident peak up to the last optimizer step and up to its end (evaluation, checkpoint and export
included). Rows are tokenized beforehand. The process without a model is measured too: it is the constant that
the estimate adds on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import PROJECT, machine, run_measured, write_results
from common.runtime.tracking import read_metrics
from common.stage import Step
from pipeline.compose import compose, prepare
from pipeline.config import PipelineConfig
from pipeline.planning import memory
from pipeline.planning.workload import workload_of
from pipeline.state import write_resolved

STEPS = 6
LARGE = (
    "{model_type: llama, hidden_size: 768, intermediate_size: 2048, num_hidden_layers: 12, "
    "num_attention_heads: 12, num_key_value_heads: 4, vocab_size: 32000, max_position_embeddings: 1024, "
    "tie_word_embeddings: true}"
)
SHAPES: dict[str, tuple[str, ...]] = {
    "demo": ("experiment=demo",),
    "gsm8k": ("experiment=gsm8k",),
    "100m": (
        f"model.config={LARGE}", "model.tokenizer.train_vocab_size=512", "model.dtype=fp32",
        "sft.data.path=demo/data/sft.jsonl", "sft.data.max_length=512", "sft.train.micro_batch_size=1",
        "sft.train.global_batch_size=2", "sft.sampling.num_prompts=0", "run_name=large",
    ),
}  # fmt: skip
BASELINE = """
import step1_sft.train, deepspeed, deepspeed.ops, datasets, pyarrow.compute
import transformers.models.llama.modeling_llama, transformers.generation.utils
from common.runtime.distributed import init_world
init_world()
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(lines["VmHWM"].split()[0]) * 1024)
"""


def configured(shape: str, stage: int, folder: Path) -> PipelineConfig:
    """The run of a shape on a ZeRO stage, in `folder`."""
    overrides = [
        *SHAPES[shape], "steps=[sft]", f"deepspeed=zero{stage}", f"output_dir={folder}",
        f"sft.train.max_steps={STEPS}", "sft.train.eval_every=0", "tracking=off",
    ]  # fmt: skip
    return compose(prepare(overrides).overrides)


def baseline(threads: int) -> int:
    """Resident bytes of a rank before it has a model."""
    environment = {**os.environ, **rank_environment(threads)}
    done = subprocess.run(
        [sys.executable, "-c", BASELINE],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def rank_environment(threads: int) -> dict[str, str]:
    """torchrun's contract for a lone rank."""
    from launch.local import KERNELS

    return {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu", **KERNELS,
    }  # fmt: skip


def compare(shape: str, stage: int, threads: int, folder: Path) -> dict[str, Any]:
    """Estimate and measurement of one run, in bytes. folder: where runs and tokenized rows go."""
    config = configured(shape, stage, folder)
    run_dir = folder / f"{shape}-zero{stage}"
    run_dir.mkdir()
    resolved = write_resolved(config, run_dir)
    command = [sys.executable, "-m", "step1_sft", "--config", str(resolved)]
    prepare_rows(shape, run_dir, command, environment=rank_environment(threads))
    usage, _ = run_measured(command, log=run_dir / "output.txt", environment=rank_environment(threads))
    peaks = [line.get("perf/peak_memory_gb", 0.0) for line in read_metrics(run_dir / "sft" / "metrics.jsonl")]
    trained_share = share_of_ledger(run_dir / "sft" / "ledger.json")
    work = workload_of(config, Step.sft, 1, gpu=False, trained_share=trained_share)
    assert work is not None
    found = memory.estimate(work)
    in_training, in_all = max(peaks) * 1e9, usage.peak_rss_mb * 1e6
    return {
        "shape": shape, "zero_stage": stage, "dtype": config.model.dtype.value,
        "parameters": work.networks[0].network.parameters, "tokens_per_pass": work.batch.tokens,
        "measured_training": in_training, "measured_process": in_all, "estimate": found.device,
        "terms": {term.name: term.device for term in found.terms},
        "off_training": found.device / in_training - 1, "off_process": found.device / in_all - 1,
    }  # fmt: skip


def prepare_rows(shape: str, run_dir: Path, command: list[str], environment: dict[str, str]) -> None:
    """Train the tokenizer and tokenize the rows in another process: both take memory of their own."""
    made, tokenizer = run_dir.parent / f"{shape}-tokenizer", run_dir / "sft" / "tokenizer"
    if made.exists():
        shutil.copytree(made, tokenizer)
        return
    run_measured([*command, "--preview"], log=run_dir / "preview.txt", environment=environment)
    shutil.copytree(tokenizer, made)


def share_of_ledger(ledger: Path) -> float:
    """Share of the tokens that is trained."""
    sources = json.loads(ledger.read_text())["sources"]
    return sum(entry["trained_tokens"] for entry in sources) / sum(entry["tokens"] for entry in sources)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_plan", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    base = baseline(args.threads)
    print(f"a rank without a model: {base / 1e6:.0f} MB (the estimate adds {memory.CPU_BASE / 1e6:.0f} MB)")
    runs = []
    with tempfile.TemporaryDirectory(prefix="memory_plan_") as folder:
        for shape, stage in itertools.product(args.shapes, args.stages):
            run = compare(shape, stage, args.threads, Path(folder))
            above = (run["estimate"] - memory.CPU_BASE) / (run["measured_training"] - base) - 1
            run["off_above_baseline"] = above
            runs.append(run)
            print(
                f"{shape:6} ZeRO-{stage} {run['dtype']}  estimate {run['estimate'] / 1e6:7.0f} MB  "
                f"training {run['measured_training'] / 1e6:7.0f} ({run['off_training']:+.1%}; without the "
                f"baseline {above:+.1%})  whole process {run['measured_process'] / 1e6:7.0f} "
                f"({run['off_process']:+.1%})",
                flush=True,
            )
    if not args.no_write:
        write_results("memory_plan", {"machine": machine(), "baseline": base, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
