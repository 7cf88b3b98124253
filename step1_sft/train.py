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
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from common.artifacts import MANIFEST, file_sha256
from common.config import to_plain
from common.data.batches import Batches, evaluation_batches
from common.data.dataset import DEMONSTRATIONS
from common.decoding.sampling import sample_completions, stop_rate
from common.model.adapters import reach
from common.model.losses import PackedCausalLM
from common.model.models import CAUSAL_LM, load_model, terminators_of
from common.phases import enter
from common.rates import Rates
from common.runtime.distributed import (
    StopSignal,
    all_reduce_sum,
    broadcast_from_rank0,
    close_world,
    init_world,
    seed_everything,
    wait_for_rank0,
)
from common.runtime.performance import performance, training_flops_per_token
from common.runtime.progress import Progress
from common.runtime.tracking import METRICS_FILE, Tracker
from common.stage import Step
from common.training import loop
from common.training.checkpoint import Checkpoints
from common.training.export import export_policy, noise_of
from common.training.optim import build_optimizer, build_schedule, set_learning_rate
from common.training.rehearsal import rehearse_export
from common.training.step_data import batch_plan, load_data, places_of
from step1_sft.config import SFTJob
from step1_sft.data import count_padding, count_tokens, load_sft_tokenizer, prompts_to_sample
from step1_sft.evaluate import evaluate
from step1_sft.loss import TokenSums, score

log = logging.getLogger("rlhf.sft")


def train(job: SFTJob, run_dir: Path) -> int:
    """Train the policy and export it. Returns 0; leaves by SystemExit(143) when told to stop, state saved."""
    # Set up ------------------------------------------------------------------------------------
    folder, config = run_dir / "sft", job.sft.train
    world = init_world()
    stop = StopSignal()
    seed_everything(job.seed)
    say = print if world.is_rank0 else log.info

    # Load --------------------------------------------------------------------------------------
    tokenizer = load_sft_tokenizer(job, folder, world.local_rank, say)
    terminators = terminators_of(tokenizer)
    data = load_data(job, Step.sft, job.sft.data, DEMONSTRATIONS, tokenizer, folder, world, say)
    broadcast_from_rank0(world, lambda: rehearse_export(job.model, CAUSAL_LM, say))
    model = load_model(
        job.model, tokenizer, seed=job.seed, device=world.device, max_length=job.sft.data.max_length
    )
    if reached := reach(model):
        say(reached)

    # Data --------------------------------------------------------------------------------------
    plan = batch_plan(job, job.sft.data, config, world)
    batches = Batches(data.train, plan, data.weights)
    total_steps = config.max_steps or batches.steps_in_epochs(config.epochs)
    prompts = prompts_to_sample(data.held_out, job, model)

    # Engine ------------------------------------------------------------------------------------
    module = PackedCausalLM(model)
    peak_lr = job.sft.peak_lr(lora=job.model.lora.enabled)
    schedule = build_schedule(job.sft.optim, total_steps)
    say(f"learning rate: {Rates.of(job.sft.optim, peak_lr, total_steps).in_words()}")
    optimizer = build_optimizer(module, job.sft.optim, peak_lr)
    flops_per_token = training_flops_per_token(model)
    engine = loop.build_engine(module, optimizer, job, config, job.sft.optim, world)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep=config.keep_checkpoints,
        world=world,
        base_revision=getattr(module.base().config, "_commit_hash", None),
    )
    counters = loop.resume(checkpoints, engine, say)

    with (
        Progress(total_steps, label="sft", done=counters.step, enabled=world.is_rank0) as progress,
        Tracker(
            "sft", job.run_name, folder, job.tracking, to_plain(job), counters.step or None,
            enabled=world.is_rank0, say=progress.log,
        ) as tracker,
    ):  # fmt: skip
        # Loop ----------------------------------------------------------------------------------
        engine.train()
        stop.deferred = True
        clock = loop.SaveClock(config.save_minutes, world)

        def evaluate_now() -> float:
            """Measure on held-out rows what would be exported now; their loss, inf where there are none."""
            if data.held_out is None:
                return math.inf
            enter("evaluate")
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
            progress.log(held_out_line(counters.step, held_out, len(data.held_out), len(prompts)))
            return held_out["eval/loss"]

        if counters.step == 0:
            evaluate_now()  # what training starts from; no checkpoint, so never the best
            progress.restart()
        while counters.step < total_steps:
            enter("step", counters.step + 1)
            began = time.perf_counter()
            micro_batches = batches.micro_batches(counters.step)
            # the one collective before the first backward: the step's tokens, and whether to stop or save
            tokens, trained, padding, stopping, saving = all_reduce_sum(
                [*count_tokens(micro_batches), count_padding(micro_batches), stop.received, clock.asks]
            )
            if stopping:
                loop.save_and_leave(checkpoints, engine, counters, progress)

            learning_rate = peak_lr * schedule(counters.applied)
            set_learning_rate(optimizer, learning_rate)
            seed_everything(job.seed, counters.step, world.rank)
            sums = TokenSums()
            for batch in micro_batches:
                result = score(engine, batch, world.device, with_entropy=True)
                engine.backward(result.loss_sum, trained)
                sums.add(result)
            outcome = engine.step()

            counters = loop.advance(counters, outcome, tokens, trained)
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
            loop.record(
                metrics, counters, outcome, partial(places_of, batches, data.train, counters.step - 1),
                engine, job.model.dtype, tracker, progress,
            )  # fmt: skip

            is_last = counters.step == total_steps
            if loop.is_due(counters.step, config.eval_every) or is_last:
                counters = loop.with_best(counters, evaluate_now())
            is_best = counters.best_step == counters.step
            if loop.is_due(counters.step, config.save_every) or saving or is_best or is_last:
                loop.save(checkpoints, engine, counters)
                clock.restart()

        # Save ----------------------------------------------------------------------------------
        enter("export")
        stop.deferred = False  # everything is saved: what is left can be done again
        engine.eval()
        probe = loop.probe_of(data.train[0], world.device)
        with torch.no_grad():
            live_logits = module.logits(probe)
        noise = noise_of(module, list(probe), live_logits)
        weights = engine.full_state_dict()
        if weights is not None:
            final = loop.metrics_of_step(folder / METRICS_FILE, total_steps)
            if warning := loop.skipped_warning(counters, job.model.dtype, Step.sft):
                progress.log(warning)
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
                noise=noise,
                say=progress.log,
            )
            tracker.log_artifact(export, "policy", file_sha256(export / MANIFEST))
            tracker.finish(summary=final)
        wait_for_rank0(world, "export")
    close_world()
    return 0


def held_out_line(step: int, metrics: Mapping[str, float], documents: int, samples: int) -> str:
    """An evaluation in one line; documents, samples: how many it is of."""
    stop_rate = metrics.get("eval/stop_rate")
    stopped = "" if stop_rate is None else f", {stop_rate:.0%} of {samples} samples stop"
    return (
        f"held out, step {step}: loss {metrics['eval/loss']:.4f} on {documents:,} documents, "
        f"token accuracy {metrics['eval/mean_token_accuracy']:.1%}{stopped}"
    )
