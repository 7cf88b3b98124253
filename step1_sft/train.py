"""SFT, read from top to bottom: set up, load, data, engine, loop, save.

Takes an `SFTJob` and a run's folder; leaves `<run>/sft/` with metrics, samples, checkpoints and, when it
is finished, the policy under `export/`. How rows become tokens is in `data.py`, what is minimised in
`loss.py`, what is measured in `evaluate.py`; mechanisms are in `common/`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from common.artifacts import MANIFEST, file_sha256
from common.checkpoint import Checkpoints
from common.config import Dtype, to_plain
from common.data.batches import Batches, evaluation_batches
from common.data.types import TokenizedExample
from common.distributed import (
    STOPPED_EXIT_CODE,
    StopSignal,
    barrier,
    close_world,
    init_world,
    seed_everything,
    sum_over_ranks,
)
from common.ds_config import build_ds_config
from common.engine import Engine, StepOutcome
from common.errors import UserError
from common.export import export_policy
from common.losses import PackedCausalLM
from common.models import load_model, terminators_of
from common.optim import build_optimizer, build_schedule, set_learning_rate
from common.performance import performance, training_flops_per_token
from common.progress import Progress
from common.sampling import sample_completions, stop_rate
from common.tracking import METRICS_FILE, Tracker, read_metrics
from step1_sft.config import SFTJob
from step1_sft.data import (
    batch_plan,
    count_padding,
    count_tokens,
    load_data,
    load_sft_tokenizer,
)
from step1_sft.evaluate import evaluate
from step1_sft.loss import TokenSums, score

MAX_SKIPPED_IN_A_ROW = 5
log = logging.getLogger("rlhf.sft")


@dataclass
class Counters:
    """Where the run is; part of every checkpoint."""

    step: int = 0  # optimizer steps whose rows were consumed
    applied: int = 0  # of these, the ones that changed the weights
    skipped_in_a_row: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None


def train(job: SFTJob, run_dir: Path) -> int:
    """Train the policy and export it. Returns 0; leaves by SystemExit(143) when told to stop, state saved."""
    # Set up ------------------------------------------------------------------------------------
    folder, config = run_dir / "sft", job.sft.train
    world = init_world()
    stop = StopSignal()
    seed_everything(job.seed)
    say = print if world.is_main else log.info

    # Load --------------------------------------------------------------------------------------
    tokenizer = load_sft_tokenizer(job, folder, world.local_rank, say)
    terminators = terminators_of(tokenizer)
    data = load_data(job, tokenizer, folder, world, say)
    say("\n".join(data.ledger.lines()))
    model = load_model(
        job.model, tokenizer, seed=job.seed, device=world.device, max_length=job.sft.data.max_length
    )

    # Data --------------------------------------------------------------------------------------
    plan = batch_plan(job, world)
    batches = Batches(data.train, plan, data.weights)
    total_steps = config.max_steps or batches.steps_in_epochs(config.epochs)
    prompts = data.prompts(job, model)

    # Engine ------------------------------------------------------------------------------------
    module = PackedCausalLM(model)
    peak_lr = job.sft.optim.lr or (2e-4 if job.model.lora.enabled else 2e-5)
    schedule = build_schedule(job.sft.optim, total_steps)
    optimizer = build_optimizer(module, job.sft.optim, peak_lr)
    engine = Engine(
        module,
        optimizer,
        build_ds_config(
            job.deepspeed,
            dtype=job.model.dtype,
            max_grad_norm=job.sft.optim.max_grad_norm,
            micro_batch_size=config.micro_batch_size,
            world_size=world.size,
            num_parameters=model.num_parameters(),
            optimizer=job.sft.optim.name,
        ),
    )
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep=config.keep_checkpoints,
        world=world,
        base_revision=getattr(module.base().config, "_commit_hash", None),
    )
    counters = Counters()
    if resumed := checkpoints.resume(engine):
        counters = Counters(**resumed.counters)
        for line in resumed.set_aside:
            say(f"set aside, not verified: {line}")
        say(f"resuming from {resumed.path}")
    flops_per_token = training_flops_per_token(model)

    with (
        Progress(total_steps, label="sft", done=counters.step, enabled=world.is_main) as progress,
        Tracker(
            "sft", job.run_name, folder, job.tracking, to_plain(job), counters.step,
            enabled=world.is_main, say=progress.log,
        ) as tracker,
    ):  # fmt: skip
        # Loop ----------------------------------------------------------------------------------
        engine.train()
        stop.deferred = True
        while counters.step < total_steps:
            began = time.perf_counter()
            micro_batches = batches.micro_batches(counters.step)
            # the one collective before the first backward: the step's tokens, and whether to stop
            tokens, trained, padding, stopping = sum_over_ranks(
                [*count_tokens(micro_batches), count_padding(micro_batches), stop.received]
            )
            if stopping:
                checkpoints.save(counters.step, engine, asdict(counters), best_step=counters.best_step)
                progress.log(
                    f"told to stop: saved at step {counters.step}; the same command goes on from there"
                )
                raise SystemExit(STOPPED_EXIT_CODE)

            learning_rate = peak_lr * schedule(counters.applied)
            set_learning_rate(optimizer, learning_rate)
            seed_everything(job.seed, counters.step, world.rank)
            sums = TokenSums()
            for batch in micro_batches:
                result = score(engine, batch, world.device, with_entropy=True)
                engine.backward(result.loss_sum, trained)
                sums.add(result)
            outcome = engine.step()

            counters = advance(counters, outcome, tokens, trained)
            metrics = {
                **sums.means(trained),
                "grad_norm": outcome.grad_norm,
                "learning_rate": learning_rate,
                "num_tokens": counters.num_tokens,
                "num_trained_tokens": counters.num_trained_tokens,
                "epoch": batches.epoch_of(counters.step),
                "perf/padding_share": padding / (tokens + padding),
                **performance(
                    flops_per_token, tokens, time.perf_counter() - began, job.model.dtype.value, world
                ),
            }
            tracker.log(metrics, counters.step)
            progress.update(
                counters.step,
                loss=metrics["loss"],
                tokens_per_second=metrics["perf/tokens_per_second"],
                mfu=metrics.get("perf/mfu"),
            )
            if not outcome.applied:
                rows = batches.rows(counters.step - 1)
                places = [data.train.place(int(index)) for row in rows for index in row]
                report_skipped(
                    counters, places, metrics["loss"], engine.loss_scale, job.model.dtype, progress
                )

            is_last, is_best = counters.step == total_steps, False
            if data.held_out is not None and (is_due(counters.step, config.eval_every) or is_last):
                held_out = evaluate(
                    engine, evaluation_batches(data.held_out, plan), data.held_out.sources, world.device
                )
                if prompts:
                    samples = sample_completions(
                        module.base(), tokenizer, prompts, terminators, job.sft.sampling, world,
                        seed=job.seed, is_partitioned=engine.zero_stage == 3,
                    )  # fmt: skip
                    held_out["eval/stop_rate"] = stop_rate(samples)
                    tracker.log_samples([asdict(sample) for sample in samples], counters.step)
                tracker.log(held_out, counters.step)
                progress.log(held_out_line(counters.step, held_out))
                is_best = held_out["eval/loss"] < (
                    math.inf if counters.best_loss is None else counters.best_loss
                )
                if is_best:
                    counters.best_step, counters.best_loss = counters.step, held_out["eval/loss"]
            if is_due(counters.step, config.save_every) or is_best or is_last:
                checkpoints.save(counters.step, engine, asdict(counters), best_step=counters.best_step)

        # Save ----------------------------------------------------------------------------------
        stop.deferred = False  # everything is saved: what is left can be done again
        engine.eval()
        probe = probe_of(data.train[0], world.device)
        with torch.no_grad():
            live_logits = module.logits(probe)
        weights = engine.full_state_dict()
        if weights is not None:
            final = metrics_of_step(folder / METRICS_FILE, total_steps)
            export = export_policy(
                model,
                weights,
                tokenizer,
                folder / "export",
                details={
                    "parents": [],
                    "resolved_config_hash": file_sha256(run_dir / "resolved.yaml"),
                    "data": data.fingerprints(),
                    "progress": asdict(counters),
                    "metrics": final,
                },
                probe=probe,
                live_logits=live_logits,
            )
            tracker.log_artifact(export, "policy", file_sha256(export / MANIFEST))
            tracker.finish(summary=final)
        barrier()
    close_world()
    return 0


def held_out_line(step: int, metrics: Mapping[str, float]) -> str:
    """An evaluation in one line."""
    stopped = f", {metrics['eval/stop_rate']:.0%} of samples stop" if "eval/stop_rate" in metrics else ""
    accuracy = metrics["eval/mean_token_accuracy"]
    return f"held out, step {step}: loss {metrics['eval/loss']:.4f}, token accuracy {accuracy:.1%}{stopped}"


def metrics_of_step(path: Path, step: int) -> dict[str, float]:
    """What was logged at a step, of training and of evaluation; a resume may have had nothing left to do."""
    lines = [line for line in read_metrics(path) if line["step"] == step]
    return {name: value for line in lines for name, value in line.items() if name != "step"}


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


def probe_of(example: TokenizedExample, device: torch.device, longest: int = 256) -> torch.Tensor:
    """The start of a document, int64 [1, N]: what the exported policy is compared with the live one on."""
    return torch.from_numpy(example.input_ids[:longest].astype(np.int64))[None].to(device)


def advance(counters: Counters, outcome: StepOutcome, tokens: float, trained: float) -> Counters:
    """The counters after one more step."""
    return Counters(
        step=counters.step + 1,
        applied=counters.applied + outcome.applied,
        skipped_in_a_row=0 if outcome.applied else counters.skipped_in_a_row + 1,
        num_tokens=counters.num_tokens + int(tokens),
        num_trained_tokens=counters.num_trained_tokens + int(trained),
        best_step=counters.best_step,
        best_loss=counters.best_loss,
    )


def report_skipped(
    counters: Counters,
    places: list[str],
    loss: float,
    loss_scale: float,
    dtype: Dtype,
    progress: Progress,
) -> None:
    """Say which rows a skipped step had; UserError after too many in a row."""
    log.warning("step %d skipped, loss %s, rows %s", counters.step, loss, ", ".join(places))
    if dtype is Dtype.fp16 and math.isfinite(loss) and loss_scale > 1:
        return  # fp16 looks for its loss scale by overflowing
    progress.log(
        f"step {counters.step}: loss {loss:.4g}, its gradient is not finite; skipped on all ranks "
        f"(its rows are named in logs/rank_0.log)"
    )
    if counters.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{counters.skipped_in_a_row} steps in a row were not finite, up to step {counters.step}",
            hint="none of them changed the weights: lower sft.optim.lr, use model.dtype=bf16 or fp32, "
            "or look at the rows named in sft/logs/rank_0.log",
        )
