"""Loss and gradient norm, step by step, beside TRL's SFTTrainer: `python -m benchmarks.sft_parity`.

Both sides start from the same fp32 weights and see the same documents in the same steps: ours through
Batches (documents laid end to end), PackedCausalLM and Engine (ZeRO 1), TRL through padded batches of its
own collator and its own trainer. Same AdamW, schedule and clipping. The criterion is a relative difference
of at most 1e-4 in the loss of every step. Writes `results/sft_parity.json`; exit status 1 when it fails.

Our gradient norm stands beside TRL's summed in float64. The one that TRL logs, which torch sums in fp32 (on
the CPU it comes out about 1e-4 too small for an embedding of a million weights), is kept in the JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import parity, workload
from benchmarks.measure import run_measured, threads_environment, write_results
from benchmarks.parity import LEARNING_RATE, LOSS, Quantity
from launch import local

ROWS_PER_STEP = 32
MICRO_BATCH = 8
QUANTITIES = (LOSS, Quantity("grad_norm", tolerance=None), LEARNING_RATE)


def main() -> int:
    """Run both sides, print the table; 0 when every step agrees."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sft_parity")
    parser.add_argument("--data", type=Path, default=workload.GSM8K)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep files here; by default a folder that is removed")
    parser.add_argument("--results", type=Path, help="folder of the JSON; by default benchmarks/results")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)  # the child process of our side
    arguments = parser.parse_args()
    if arguments.ours is not None:
        run_ours(json.loads(arguments.ours.read_text()))
        return 0
    with tempfile.TemporaryDirectory(prefix="sft_parity_") as temporary:
        folder = arguments.work or Path(temporary)
        made = workload.prepare(folder, arguments.data, arguments.steps * ROWS_PER_STEP)
        ours, theirs = compare(made, folder, arguments.steps, arguments.threads)
    result = {"rows_per_step": ROWS_PER_STEP, **parity.summary(ours, theirs, QUANTITIES)}
    print(parity.render(ours, theirs, QUANTITIES))
    print(parity.verdict(result))
    print(f"written: {write_results('sft_parity', result, to=arguments.results)}")
    return 0 if result["passed"] else 1


def compare(
    made: workload.Workload, folder: Path, steps: int, threads: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """(ours, TRL's), one entry per step."""
    environment = threads_environment(threads)
    settings = {"base": str(made.base), "rows": str(made.rows), "steps": steps, "out": str(folder)}
    (folder / "ours.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "benchmarks.sft_parity", "--ours", str(folder / "ours.json")]
    one_rank = local.environment(local.Job("benchmarks.sft_parity", ()))
    run_measured(command, log=folder / "ours.log", environment={**one_rank, **environment})
    (folder / "trl.json").write_text(json.dumps(trl_settings(made, folder, steps)))
    command = [sys.executable, "-m", "benchmarks.trl_sft", str(folder / "trl.json")]
    run_measured(command, log=folder / "trl.log", environment=environment)
    ours = json.loads((folder / "ours_steps.json").read_text())
    return ours, parity.read_trl(folder / "trl", QUANTITIES)


def trl_settings(made: workload.Workload, folder: Path, steps: int) -> dict[str, Any]:
    """TRL on the documents that our side wrote down, in that order."""
    return {
        "base": str(made.base),
        "dtype": "fp32",
        "tokenized": str(folder / "documents.json"),
        "out": str(folder / "trl"),
        "save": False,
        "exact_grad_norm": True,
        "arguments": {
            **workload.optimizer_arguments(),
            "warmup_steps": _warmup_steps(steps),
            "max_steps": steps,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": ROWS_PER_STEP // MICRO_BATCH,
            "train_sampling_strategy": "sequential",
            "max_length": workload.MAX_LENGTH,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
        },
    }


def _warmup_steps(steps: int) -> int:
    from common.rates import warmup_steps

    return warmup_steps(workload.WARMUP_RATIO, steps)


# our side, in a process of its own


def run_ours(settings: dict[str, Any]) -> None:
    """Train with the pipeline's own classes; write `documents.json` and `ours_steps.json`."""
    from common.config import DataConfig, Dtype, ModelConfig
    from common.data import dataset
    from common.data.batches import Batches, BatchPlan
    from common.data.dataset_types import DEMONSTRATIONS
    from common.model.tokenizer import load_tokenizer
    from common.runtime.distributed import close_world, init_world

    out, steps = Path(settings["out"]), settings["steps"]
    world = init_world()
    model_config = ModelConfig(path=settings["base"], dtype=Dtype.fp32)
    tokenizer = load_tokenizer(model_config)
    data = DataConfig(path=settings["rows"], max_length=workload.MAX_LENGTH, packing=False, eval_fraction=0.0)
    documents, _, _ = dataset.build(data, tokenizer, DEMONSTRATIONS, seed=0, cache_dir=out / "cache")
    plan = BatchPlan(workload.MAX_LENGTH, False, ROWS_PER_STEP, MICRO_BATCH, 0, world.rank, world.size)
    batches = Batches(documents, plan)
    order = [int(index) for step in range(steps) for row in batches.rows(step) for index in row]
    (out / "documents.json").write_text(json.dumps(as_lists(documents, order)))
    (out / "ours_steps.json").write_text(
        json.dumps(_train_ours(model_config, tokenizer, batches, steps, world))
    )
    close_world()


def _train_ours(
    model_config: Any, tokenizer: Any, batches: Any, steps: int, world: Any
) -> list[dict[str, float]]:
    from common.config import DeepSpeedConfig, Dtype
    from common.model.loading import load_model
    from common.model.packed import PackedCausalLM
    from common.model.probes import find_shortcuts
    from common.training.ds_config import build_ds_config
    from common.training.engine import Engine
    from common.training.optim import build_optimizer, build_schedule, set_learning_rate
    from common.training_config import OptimConfig
    from step1_sft.data import count_tokens
    from step1_sft.loss import TokenSums, compute_loss

    optim = OptimConfig(
        lr=workload.LEARNING_RATE, betas=list(workload.BETAS), eps=workload.EPS,
        warmup_ratio=workload.WARMUP_RATIO, min_lr_ratio=workload.MIN_LR_RATIO,
        max_grad_norm=workload.MAX_GRAD_NORM,
    )  # fmt: skip
    model = load_model(model_config, tokenizer, seed=0, device=world.device, max_length=workload.MAX_LENGTH)
    module = PackedCausalLM(model, find_shortcuts(model))
    optimizer = build_optimizer(module, optim, workload.LEARNING_RATE)
    ds_config = build_ds_config(
        DeepSpeedConfig(stage=1), dtype=Dtype.fp32, max_grad_norm=optim.max_grad_norm,
        micro_batch_size=MICRO_BATCH, world_size=world.size, num_parameters=model.num_parameters(),
    )  # fmt: skip
    engine, schedule = Engine(module, optimizer, ds_config), build_schedule(optim, steps)
    engine.train()
    logged = []
    for step in range(steps):
        learning_rate = workload.LEARNING_RATE * schedule(step)
        set_learning_rate(optimizer, learning_rate)
        micro_batches = batches.micro_batches(step)
        _, trained, _ = count_tokens(micro_batches)
        sums = TokenSums()
        for batch in micro_batches:
            result = compute_loss(engine, batch, world.device, with_entropy=False)
            engine.backward(result.loss_sum, trained)
            sums.add(result)
        norm = engine.step().grad_norm
        logged.append(
            {
                "loss": sums.means(trained, with_entropy=False)["loss"],
                "grad_norm": norm,
                "learning_rate": learning_rate,
            }
        )
    return logged


def as_lists(documents: Any, order: list[int]) -> dict[str, list[list[int]]]:
    """Documents as TRL takes them: labels stand where their tokens do, not one to the left."""
    from common.data.types import IGNORE

    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for index in order:
        example = documents[index]
        columns["input_ids"].append(example.input_ids.tolist())
        columns["labels"].append([IGNORE, *example.labels[:-1].tolist()])
    return columns


if __name__ == "__main__":
    sys.exit(main())
