"""SFT, read from top to bottom: set up, load, data, engine, loop, save.

Takes an `SFTJob` and a run's folder; leaves `<run>/sft/` with metrics, samples, checkpoints and, when it
is finished, the policy under `export/`. How rows become tokens is in `data.py`, what is minimised in
`loss.py`; mechanisms are in `common/`.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common.checkpoint import Checkpoints
from common.config import Dtype, to_plain
from common.data.batches import Batches
from common.distributed import STOPPED_EXIT_CODE, StopSignal, init_world, seed_everything, sum_over_ranks
from common.ds_config import build_ds_config
from common.engine import Engine
from common.errors import UserError
from common.losses import PackedCausalLM
from common.models import load_model
from common.optim import build_optimizer, build_schedule, set_learning_rate
from common.performance import measure
from common.progress import Progress
from common.tracking import Tracker
from step1_sft.config import SFTJob
from step1_sft.data import batch_plan, count_tokens, load_data, load_sft_tokenizer
from step1_sft.evaluate import evaluate, sample
from step1_sft.loss import TokenSums, score
from step1_sft.save import export

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
    """Train the policy and export it. Returns the exit status: 0 done, 143 told to stop (state saved)."""
    # Set up ------------------------------------------------------------------------------------
    folder, config = run_dir / "sft", job.sft.train
    world = init_world()
    stop = StopSignal()
    seed_everything(job.seed)
    progress = Progress("sft", enabled=world.is_main)

    # Load --------------------------------------------------------------------------------------
    tokenizer = load_sft_tokenizer(job, folder, world)
    data = load_data(job, tokenizer, folder, world)
    progress.lines(data.ledger.lines())
    model = load_model(job.model, tokenizer, seed=job.seed, device=world.device)

    # Data --------------------------------------------------------------------------------------
    plan = batch_plan(job, world)
    batches = Batches(data.train, plan, data.weights)
    total_steps = config.max_steps or batches.steps_in_epochs(config.epochs)

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
        ),
    )
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints, world=world)
    counters = Counters()
    if resumed := checkpoints.resume(engine):
        counters = Counters(**resumed.counters)
        progress.lines([f"set aside {line}" for line in resumed.set_aside])
        progress.lines([f"resumed from {resumed.path}"])
    tracker = Tracker(
        "sft",
        job.run_name,
        folder,
        job.tracking,
        to_plain(job),
        counters.step,
        enabled=world.is_main,
        say=progress.log,
    )

    # Loop --------------------------------------------------------------------------------------
    progress.start(total_steps, done=counters.step)
    while counters.step < total_steps:
        began = time.perf_counter()
        micro_batches = batches.micro_batches(counters.step)
        # the one collective before the first backward: tokens of the whole step, and who was told to stop
        tokens, trained, stopping = sum_over_ranks([*count_tokens(micro_batches), stop.received])
        if stopping:
            checkpoints.save(counters.step, engine, asdict(counters), best_step=counters.best_step)
            progress.log(f"told to stop: saved at step {counters.step}; the same command goes on from there")
            tracker.finish(exit_code=STOPPED_EXIT_CODE)
            return STOPPED_EXIT_CODE

        lr = peak_lr * schedule(counters.applied)
        set_learning_rate(optimizer, lr)
        sums = TokenSums()
        for batch in micro_batches:
            result = score(engine, batch, world.device, with_entropy=True)
            engine.backward(result.loss_sum, trained)
            sums.add(result)
        outcome = engine.step()

        counters.step += 1
        counters.num_tokens += int(tokens)
        counters.num_trained_tokens += int(trained)
        counters.applied += outcome.applied
        counters.skipped_in_a_row = 0 if outcome.applied else counters.skipped_in_a_row + 1
        metrics = {
            **sums.means(trained),
            "grad_norm": outcome.grad_norm,
            "learning_rate": lr,
            "num_tokens": counters.num_tokens,
            "num_trained_tokens": counters.num_trained_tokens,
            "epoch": batches.epoch_of(counters.step),
            **measure(model, tokens, time.perf_counter() - began, world),
        }
        tracker.log(metrics, counters.step)
        progress.update(counters.step, metrics)
        if not outcome.applied:
            report_skipped(counters, batches, metrics["loss"], engine, job.model.dtype)

        is_last, is_best = counters.step == total_steps, False
        if data.held_out is not None and (is_due(counters.step, config.eval_every) or is_last):
            held_out = evaluate(engine, data.held_out, plan, world.device)
            samples = sample(engine, tokenizer, data, job, world, counters.step)
            ...
            is_best = counters.best_loss is None or held_out["eval/loss"] < counters.best_loss
            if is_best:
                counters.best_step, counters.best_loss = counters.step, held_out["eval/loss"]
        if is_due(counters.step, config.save_every) or is_last or is_best:
            checkpoints.save(counters.step, engine, asdict(counters), best_step=counters.best_step)

    # Save --------------------------------------------------------------------------------------
    ...
    return 0
