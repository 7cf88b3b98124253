"""DPO, read from top to bottom: set up, load, data, engine, reference, loop, save.

Takes a `DPOJob` and a run's folder; leaves `<run>/dpo/` with metrics, samples, checkpoints and, when it is
finished, the policy under `export/`. How rows become tokens is in `data.py`, what the starting policy says of
them in `reference.py`, what is minimised in `loss.py`, what is measured in `evaluate.py`; mechanisms are in
`common/`.
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
from common.data.batches import PairBatches, count_pairs, evaluation_pair_batches
from common.data.dataset import PREFERENCES
from common.decoding.sampling import sample_completions, stop_rate
from common.evidence import share_in_words
from common.handoff import load_named, model_of, parent_record
from common.model.adapters import reach
from common.model.losses import PackedCausalLM
from common.model.models import CAUSAL_LM, disable_dropout, load_model, load_tokenizer, terminators_of
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
from common.stage import Role, Step
from common.training import loop
from common.training.checkpoint import Checkpoints
from common.training.export import export_policy, noise_of
from common.training.optim import build_optimizer, build_schedule, set_learning_rate
from common.training.rehearsal import rehearse_export
from common.training.step_data import batch_plan, cache_dir, load_data, places_of
from step2_dpo.config import DPOJob
from step2_dpo.data import prompts_to_sample
from step2_dpo.evaluate import evaluate
from step2_dpo.loss import Objective, PairSums, StepCounts, score, step_loss
from step2_dpo.reference import load_or_compute, reference_key

log = logging.getLogger("rlhf.dpo")


def train(job: DPOJob, run_dir: Path) -> int:
    """Train the policy and export it. Returns 0; leaves by SystemExit(143) when told to stop, state saved."""
    # Set up ------------------------------------------------------------------------------------
    folder, config = run_dir / "dpo", job.dpo.train
    world = init_world()
    stop = StopSignal()
    seed_everything(job.seed)
    say = print if world.is_rank0 else log.info

    # Load --------------------------------------------------------------------------------------
    named = job.dpo.policy or ""  # the controller has written down where an earlier step leaves it
    policy = broadcast_from_rank0(world, lambda: load_named(named, Role.policy, "dpo.policy"))
    model_config = model_of(job.model, policy.path)
    tokenizer = load_tokenizer(model_config)
    terminators = terminators_of(tokenizer)
    data = load_data(job, Step.dpo, job.dpo.data, PREFERENCES, tokenizer, folder, world, say, policy=policy)
    if data.train.margins.any():
        say("note: the pairs have margins, which the reward model uses and DPO does not")
    broadcast_from_rank0(world, lambda: rehearse_export(model_config, CAUSAL_LM, say))
    model = load_model(
        model_config, tokenizer, seed=job.seed, device=world.device, max_length=job.dpo.data.max_length
    )
    if reached := reach(model):
        say(reached)
    disable_dropout(model)  # the policy's answers are compared with the reference's, number by number

    # Data --------------------------------------------------------------------------------------
    module = PackedCausalLM(model)
    plan = batch_plan(job, job.dpo.data, config, world, share_prefix=module.shares_prefix)
    batches = PairBatches(data.train, plan, data.weights)
    total_steps = config.max_steps or batches.steps_in_epochs(config.epochs)
    prompts = prompts_to_sample(data.held_out, job, model)

    # Engine ------------------------------------------------------------------------------------
    objective = Objective.of(job.dpo)
    peak_lr = job.dpo.peak_lr(lora=job.model.lora.enabled)
    schedule = build_schedule(job.dpo.optim, total_steps)
    say(f"learning rate: {Rates.of(job.dpo.optim, peak_lr, total_steps).in_words()}")
    optimizer = build_optimizer(module, job.dpo.optim, peak_lr)
    flops_per_token = training_flops_per_token(model)
    engine = loop.build_engine(module, optimizer, job, config, job.dpo.optim, world)

    # Reference ---------------------------------------------------------------------------------
    # while the engine still holds the policy that the run starts from
    key = reference_key(
        policy, model_config, plan, data=data.fingerprints(), weights=data.weights, steps=total_steps,
        device=world.device,
    )  # fmt: skip
    folder_of_references = cache_dir(job, job.dpo.data) / "reference"
    reference = load_or_compute(
        engine, batches, data.held_out, total_steps, key, folder_of_references, world, say
    )
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints, world=world)
    counters = loop.resume(checkpoints, engine, say)

    with (
        Progress(total_steps, label="dpo", done=counters.step, enabled=world.is_rank0) as progress,
        Tracker(
            "dpo", job.run_name, folder, job.tracking, to_plain(job), counters.step or None,
            enabled=world.is_rank0, say=progress.log,
        ) as tracker,
    ):  # fmt: skip
        # Loop ----------------------------------------------------------------------------------
        engine.train()
        stop.deferred = True
        clock = loop.SaveClock(config.save_minutes, world)

        def evaluate_now() -> float:
            """Measure on held-out pairs what would be exported now; their loss, inf where there are none."""
            if data.held_out is None:
                return math.inf
            enter("evaluate")
            held_out = evaluate(
                engine, evaluation_pair_batches(data.held_out, plan), reference, objective, world.device
            )
            if prompts:
                samples = sample_completions(
                    module.base(), tokenizer, prompts, terminators, job.dpo.sampling, world,
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
            # the one collective before the first backward: what the step holds, and whether to stop or save
            _, tokens, computed, padding, stopping, saving, *counted = all_reduce_sum(
                [*count_pairs(micro_batches), stop.received, clock.asks, *StepCounts.of(micro_batches)]
            )
            if stopping:
                loop.save_and_leave(checkpoints, engine, counters, progress)

            counts = StepCounts(*counted)
            learning_rate = peak_lr * schedule(counters.applied)
            set_learning_rate(optimizer, learning_rate)
            seed_everything(job.seed, counters.step, world.rank)
            sums = PairSums()
            for batch in micro_batches:
                known = reference.of_train(batch)
                result = score(engine, batch, known, objective, world.device, with_entropy=True)
                engine.backward(step_loss(result, objective, counts), 1.0)
                sums.add(result, objective)
            outcome = engine.step()

            counters = loop.advance(counters, outcome, tokens, counts.response_tokens)
            seconds = time.perf_counter() - began
            metrics = {
                **sums.metrics(objective, counts),
                "grad_norm": outcome.grad_norm,
                "learning_rate": learning_rate,
                "num_tokens": counters.num_tokens,
                "num_trained_tokens": counters.num_trained_tokens,
                "epoch": batches.epoch_of(counters.step),
                "perf/padding_share": padding / (computed + padding),
                # a shared prompt is two tokens to the reader and one to the device
                **performance(
                    flops_per_token * computed / tokens, tokens, seconds, job.model.dtype.value, world
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
        probe = loop.probe_of(data.train[0].chosen, world.device)
        with torch.no_grad():
            live_logits = module.logits(probe)
        noise = noise_of(module, list(probe), live_logits)
        weights = engine.full_state_dict()
        if weights is not None:
            final = loop.metrics_of_step(folder / METRICS_FILE, total_steps)
            part = "" if data.held_out is None else "eval/"
            swapped = loop.swapped_warning(
                final, f"{part}rewards/accuracies", f"{part}rewards/margins", step=Step.dpo,
                pairs=config.global_batch_size if data.held_out is None else len(data.held_out),
            )  # fmt: skip
            for line in filter(None, [swapped, loop.skipped_warning(counters, job.model.dtype, Step.dpo)]):
                progress.log(line)
            export = export_policy(
                model,
                weights,
                tokenizer,
                folder / "export",
                details={
                    "parents": [parent_record(policy.path, run_dir)],
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


def held_out_line(step: int, metrics: Mapping[str, float], pairs: int, samples: int) -> str:
    """An evaluation in one line; pairs, samples: how many it is of."""
    stop_rate = metrics.get("eval/stop_rate")
    stopped = "" if stop_rate is None else f", {stop_rate:.0%} of {samples} samples stop"
    return (
        f"held out, step {step}: loss {metrics['eval/loss']:.4f}, "
        f"{share_in_words(metrics['eval/rewards/accuracies'], pairs, 'pairs')} in order, "
        f"margin {metrics['eval/rewards/margins']:.4g}{stopped}"
    )
