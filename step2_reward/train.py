"""The reward model, read from top to bottom: set up, load, data, engine, loop, save.

Takes a `RewardJob` and a run's folder; leaves `<run>/reward/` with metrics, checkpoints and, when it is
finished, the reward model under `export/`. How rows become tokens is in `data.py`, what is minimised in
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
from common.data.batches import PairBatches, count_pairs, evaluation_pair_batches
from common.data.dataset import PREFERENCES
from common.evidence import share_in_words
from common.handoff import load_named, model_of, parent_record
from common.model.adapters import reach
from common.model.models import load_tokenizer
from common.model.scalar_head import NEW_REWARD_MODEL, PackedScalarModel, load_scalar_model
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
from common.training.export import export_reward_model, noise_of
from common.training.optim import build_optimizer, build_schedule, set_learning_rate
from common.training.rehearsal import rehearse_export
from common.training.step_data import batch_plan, load_data, places_of
from step2_reward.config import RewardConfig, RewardJob
from step2_reward.data import PairSubset, probe_documents
from step2_reward.evaluate import calibration, held_out_metrics, score_pairs
from step2_reward.loss import ScoredPairs, measure, pair_losses, score

log = logging.getLogger("rlhf.reward")

CALIBRATION_PAIRS = 128
"""Training pairs that calibrate the rewards when none are held out, at most."""


def train(job: RewardJob, run_dir: Path) -> int:
    """Train the reward model and export it. Returns 0; leaves by SystemExit(143) when told to stop, state
    saved."""
    # Set up ------------------------------------------------------------------------------------
    folder, config, centering = run_dir / "reward", job.reward.train, job.reward.center_rewards_coefficient
    world = init_world()
    stop = StopSignal()
    seed_everything(job.seed)
    say = print if world.is_rank0 else log.info

    # Load --------------------------------------------------------------------------------------
    named = job.reward.policy or ""  # the controller has written down where an earlier step leaves it
    policy = broadcast_from_rank0(world, lambda: load_named(named, Role.policy, "reward.policy"))
    model_config = model_of(job.model, policy.path)
    tokenizer = load_tokenizer(model_config)
    data = load_data(
        job, Step.reward, job.reward.data, PREFERENCES, tokenizer, folder, world, say, policy=policy
    )
    broadcast_from_rank0(world, lambda: rehearse_export(model_config, NEW_REWARD_MODEL, say))
    model = load_scalar_model(
        model_config, tokenizer, seed=job.seed, device=world.device, max_length=job.reward.data.max_length
    )
    if reached := reach(model):
        say(reached)

    # Data --------------------------------------------------------------------------------------
    module = PackedScalarModel(model)
    plan = batch_plan(job, job.reward.data, config, world, share_prefix=module.shares_prefix)
    batches = PairBatches(data.train, plan, data.weights)
    total_steps = config.max_steps or batches.steps_in_epochs(config.epochs)

    # Engine ------------------------------------------------------------------------------------
    peak_lr = job.reward.peak_lr(lora=job.model.lora.enabled)
    schedule = build_schedule(job.reward.optim, total_steps)
    say(f"learning rate: {Rates.of(job.reward.optim, peak_lr, total_steps).in_words()}")
    optimizer = build_optimizer(module, job.reward.optim, peak_lr)
    flops_per_token = training_flops_per_token(model)
    engine = loop.build_engine(module, optimizer, job, config, job.reward.optim, world)
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints, world=world)
    counters = loop.resume(checkpoints, engine, say)

    with (
        Progress(total_steps, label="reward", done=counters.step, enabled=world.is_rank0) as progress,
        Tracker(
            "reward", job.run_name, folder, job.tracking, to_plain(job), counters.step or None,
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
            scores_now = score_pairs(engine, evaluation_pair_batches(data.held_out, plan), world.device)
            held_out = held_out_metrics(scores_now, data.held_out.sources, centering)
            tracker.log(held_out, counters.step)
            progress.log(held_out_line(counters.step, held_out, len(data.held_out)))
            return held_out["eval/loss"]

        if counters.step == 0:
            evaluate_now()  # what training starts from; no checkpoint, so never the best
            progress.restart()
        while counters.step < total_steps:
            enter("step", counters.step + 1)
            began = time.perf_counter()
            micro_batches = batches.micro_batches(counters.step)
            # the one collective before the first backward: what the step holds, and whether to stop or save
            pairs, tokens, computed, padding, stopping, saving = all_reduce_sum(
                [*count_pairs(micro_batches), stop.received, clock.asks]
            )
            if stopping:
                loop.save_and_leave(checkpoints, engine, counters, progress)

            learning_rate = peak_lr * schedule(counters.applied)
            set_learning_rate(optimizer, learning_rate)
            seed_everything(job.seed, counters.step, world.rank)
            scored = []
            for batch in micro_batches:
                scores = score(engine, batch, world.device)
                losses = pair_losses(scores, batch.margins.to(world.device), centering)
                engine.backward(losses.sum(), pairs)
                scored.append(ScoredPairs.of(batch, scores))
            outcome = engine.step()

            counters = loop.advance(counters, outcome, tokens, trained=tokens)
            seconds = time.perf_counter() - began
            metrics = {
                **measure(ScoredPairs.all_gathered(scored), centering),
                "grad_norm": outcome.grad_norm,
                "learning_rate": learning_rate,
                "num_tokens": counters.num_tokens,
                "epoch": batches.epoch_of(counters.step),
                "perf/padding_share": padding / (computed + padding),
                # a shared prompt is two times its tokens to the reader and once to the device
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
        measured, measured_pairs = {}, data.held_out or PairSubset(data.train, CALIBRATION_PAIRS, job.seed)
        if data.held_out is None:
            scores_now = score_pairs(engine, evaluation_pair_batches(measured_pairs, plan), world.device)
            measured = held_out_metrics(scores_now, data.train.sources, centering)
        engine.eval()
        probe = probe_documents(data.train, world.device)
        with torch.no_grad():
            live_scores = module.scores(probe)
        noise = noise_of(module, probe, live_scores)
        weights = engine.full_state_dict()
        if weights is not None:
            final = loop.metrics_of_step(folder / METRICS_FILE, total_steps)
            measured = measured or final
            lines = closing_lines(
                measured, job.reward, len(measured_pairs), on_held_out=data.held_out is not None
            )
            for line in filter(None, [*lines, loop.skipped_warning(counters, job.model.dtype, Step.reward)]):
                progress.log(line)
            export = export_reward_model(
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
                    "calibration": calibration(measured, len(measured_pairs)),
                },
                probe=probe,
                live_scores=live_scores,
                noise=noise,
                say=progress.log,
            )
            tracker.log_artifact(export, "reward_model", file_sha256(export / MANIFEST))
            tracker.finish(summary=final)
        wait_for_rank0(world, "export")
    close_world()
    return 0


def held_out_line(step: int, metrics: Mapping[str, float], pairs: int) -> str:
    """An evaluation in one line; pairs: how many it is of."""
    return (
        f"held out, step {step}: loss {metrics['eval/loss']:.4f}, "
        f"{share_in_words(metrics['eval/accuracy'], pairs, 'pairs')} in order, "
        f"margin {metrics['eval/margin']:.4g}"
    )


def closing_lines(
    metrics: Mapping[str, float], reward: RewardConfig, pairs: int, *, on_held_out: bool
) -> list[str]:
    """What the user should know of the finished model. metrics: of the pairs that calibrate its rewards."""
    lines, accuracy, least = [], metrics["eval/accuracy"], reward.warn_below_accuracy
    which = "held-out" if on_held_out else "training"
    if not on_held_out:
        lines.append(
            f"no pairs are held out: accuracy ({accuracy:.1%}) and calibration are those of {pairs} "
            "training pairs, which flatters"
        )
    swapped = loop.swapped_warning(metrics, "eval/accuracy", "eval/margin", step=Step.reward, pairs=pairs)
    if swapped and on_held_out:
        lines.append(swapped)
    elif accuracy < least:
        lines.append(
            f"warning: the reward model orders {share_in_words(accuracy, pairs, f'{which} pairs')} as people "
            f"did, less than reward.warn_below_accuracy={least}: a policy trained on it would follow its "
            "mistakes"
        )
    return lines
