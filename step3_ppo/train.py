"""PPO, read from top to bottom: set up, load, data, networks, loop, save.

Takes a `PPOJob` and a run's folder; leaves `<run>/ppo/` with metrics, samples, checkpoints and, when it is
finished, the policy under `export/`. The loop numbers the parts of an iteration as the algorithm does:

1. sample responses from the actor (rollout.py)              5. advantages and returns (advantages.py)
2. score them (rewards.py)                                   6. update actor and critic (update.py, loss.py)
3. log-probabilities, the reference's, values (networks.py)  7. move the KL coefficient (kl.py)
4. rewards of tokens (advantages.py)

Proximal policy optimization (arXiv 1707.06347) as InstructGPT uses it (2203.02155), with the details that
"The N+ implementation details of RLHF with PPO" (2403.17031) found to matter. What is measured on held-out
prompts is in evaluate.py; mechanisms are in `common/`.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import torch

from common.artifacts import MANIFEST, file_sha256
from common.config import to_plain
from common.data.batches import Batches
from common.data.dataset import DEMONSTRATIONS
from common.errors import UserError
from common.handoff import check_same_tokens, load_named, model_of, parent_record
from common.model.adapters import reach
from common.model.models import CAUSAL_LM, load_tokenizer, terminators_of
from common.phases import enter
from common.runtime.distributed import (
    STOPPED_EXIT_CODE,
    StopSignal,
    all_reduce_sum,
    broadcast_from_rank0,
    close_world,
    init_world,
    seed_everything,
    wait_for_rank0,
)
from common.runtime.performance import training_flops_per_token
from common.runtime.progress import Progress
from common.runtime.tracking import METRICS_FILE, Tracker
from common.stage import Role, Step
from common.training import loop
from common.training.average import ExponentialAverage, swapped_in
from common.training.checkpoint import Checkpoints, State, States
from common.training.export import export_policy, noise_of
from common.training.rehearsal import rehearse_export
from common.training.step_data import batch_plan, load_data
from step3_ppo.advantages import with_advantages
from step3_ppo.clock import Stopwatch, speed
from step3_ppo.config import PPOConfig, PPOJob
from step3_ppo.data import PromptOrder, load_prompts
from step3_ppo.evaluate import evaluation_of
from step3_ppo.experience import Experience
from step3_ppo.kl import next_coef
from step3_ppo.loss import UpdateSums
from step3_ppo.metrics import held_out_line, of_iteration
from step3_ppo.minibatches import all_minibatches, first_pass, updates_in
from step3_ppo.networks import build_networks
from step3_ppo.rollout import Sampler
from step3_ppo.scoring import Scoring
from step3_ppo.state import PPOCounters, Unfinished
from step3_ppo.update import report_skipped, skipped_warnings, update
from step3_ppo.watchdogs import Watchdogs

log = logging.getLogger("rlhf.ppo")


def train(job: PPOJob, run_dir: Path) -> int:
    """Train the policy and export it. Returns 0; leaves by SystemExit(143) when told to stop, state saved."""
    # Set up ------------------------------------------------------------------------------------
    folder, ppo, config = run_dir / "ppo", job.ppo, job.ppo.train
    world = init_world()
    stop = StopSignal()
    seed_everything(job.seed)
    say = print if world.is_rank0 else log.info
    for line in ppo.notes():
        say(f"note: {line}")

    # Load --------------------------------------------------------------------------------------
    policy = broadcast_from_rank0(world, lambda: load_named(ppo.policy or "", Role.policy, "ppo.policy"))
    parents, reward_model = [policy], None
    if ppo.needs(Role.reward_model):
        named = ppo.reward_model or ""
        reward_model = broadcast_from_rank0(
            world, lambda: load_named(named, Role.reward_model, "ppo.reward_model")
        )
        check_same_tokens(policy, reward_model)  # it is given the policy's token ids
        parents.append(reward_model)
    tokenizer = load_tokenizer(model_of(job.model, policy.path))
    data = load_prompts(job, tokenizer, folder, world, say, policy=policy)
    scoring = Scoring(ppo, reward_model, tokenizer, world)
    scoring.check(data.train)
    if data.held_out is not None:
        scoring.check(data.held_out, held_out=True)

    # Data --------------------------------------------------------------------------------------
    order = PromptOrder(data.train, ppo.rollout.prompts, job.seed, data.weights)
    total_steps = ppo.iterations_over(order.prompts_per_epoch)
    if filling := ppo.filling(order.prompts_per_epoch):
        say(f"note: {filling}")
    check_actor_learns(ppo, total_steps)
    plan = batch_plan(job, ppo.data, config, world)
    updates = updates_in(ppo.responses_per_iteration, plan, ppo.ppo_epochs)  # of an iteration, at most
    demonstrations, fingerprints = None, data.fingerprints()
    if ppo.ptx_weight:
        ptx = load_data(job, Step.ppo, ppo.ptx_data, DEMONSTRATIONS, tokenizer, folder / "ptx", world, say)
        ptx_plan = replace(batch_plan(job, ppo.ptx_data, config, world), global_batch_size=ppo.ptx_batch_size)
        demonstrations = Batches(ptx.train, ptx_plan, ptx.weights)
        fingerprints["ptx"] = ptx.train.fingerprint

    # Networks ----------------------------------------------------------------------------------
    broadcast_from_rank0(world, lambda: rehearse_export(model_of(job.model, policy.path), CAUSAL_LM, say))
    networks = build_networks(
        job, policy, reward_model, tokenizer, world,
        actor_updates=updates * (total_steps - ppo.critic.warmup_iterations),
        critic_updates=updates * total_steps,
    )  # fmt: skip
    for name, trained in (("actor", networks.actor), ("critic", networks.critic)):
        if trained is not None:
            say(f"{name}: learning rate {trained.rates.in_words()}")
    if reached := reach(networks.model):
        say(reached)
    plan = replace(plan, share_prefix=networks.share_prefix)
    evaluation = evaluation_of(data.held_out, scoring, plan, ppo.evaluation, job.seed)
    actor = networks.actor.engine
    flops_per_token = training_flops_per_token(networks.model)
    sampler = Sampler(actor, networks.model, ppo.rollout, terminators_of(tokenizer), world, stop)
    average = None if ppo.ema_decay is None else ExponentialAverage(actor, ppo.ema_decay)
    unfinished = Unfinished(writes=world.is_rank0)
    critic = None if networks.critic is None else networks.critic.engine
    parts: dict[str, State | None] = {
        "actor": actor, "experience": unfinished, "critic": critic, "average": average,
    }  # fmt: skip
    state = States(**{name: part for name, part in parts.items() if part is not None})
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep_checkpoints, world=world)
    restored = loop.restore(checkpoints, state, say, lambda stored: PPOCounters(**stored).place)
    counters = PPOCounters(**restored or {"kl_coef": ppo.kl.coef})

    with (
        Progress(total_steps, label="ppo", done=counters.step, enabled=world.is_rank0) as progress,
        Tracker(
            "ppo", job.run_name, folder, job.tracking, to_plain(job),
            None if counters.is_fresh else counters.step, enabled=world.is_rank0, say=progress.log,
        ) as tracker,
    ):  # fmt: skip
        # Loop ----------------------------------------------------------------------------------
        stop.deferred = True
        save_clock = loop.SaveClock(config.save_minutes, world)
        watchdogs = Watchdogs(ppo, job.model.dtype, counters.watchdogs)
        learned = UpdateSums(**counters.sums)

        def save() -> None:
            """Commit a checkpoint of this moment, also between two updates of an iteration."""
            now = replace(counters, sums=learned.state(), watchdogs=watchdogs.state())
            checkpoints.save(counters.step * updates + counters.update, state, asdict(now), best_step=None)
            save_clock.restart()

        def leave() -> NoReturn:
            save()
            progress.log(
                f"told to stop: saved in iteration {counters.step + 1}; the same command goes on there"
            )
            raise SystemExit(STOPPED_EXIT_CODE)

        def evaluate() -> None:
            """Measure on held-out prompts what would be exported now."""
            if evaluation is None:
                return
            enter("evaluate")
            networks.eval()
            with swapped_in(average):
                held_out, samples = evaluation(networks, sampler)
            tracker.log(held_out, counters.step)
            tracker.log_samples(samples, counters.step)
            progress.log(held_out_line(counters.step, held_out))
            for line in watchdogs.look_at_evaluation(counters.step, held_out):
                progress.log(f"warning: {line}")

        if counters.is_fresh:
            evaluate()
            progress.restart()
        while counters.step < total_steps:
            enter("step", counters.step + 1)
            clock = Stopwatch(is_whole=unfinished.experience is None)
            networks.eval()
            if unfinished.experience is None:
                # 1. Sample responses from the actor.
                enter("rollout")
                prompt_ids = order.prompts_of(counters.step)
                samples_each = ppo.rollout.samples_per_prompt
                responses = sampler(
                    data.train, prompt_ids, key=(job.seed, counters.step), samples=samples_each
                )
                if responses is None:
                    leave()
                experience = Experience(responses)
                clock.lap("rollout")
                # 2. Score them, in the micro-batches in which part 6 sees them first.
                enter("score")
                batches = first_pass(experience, plan, iteration=counters.step)
                texts = scoring.texts(responses, data.train)
                experience = scoring.score(experience, texts, batches, networks)
                # 3. Log-probabilities of the actor and the reference, and the critic's values.
                experience = networks.with_token_numbers(experience, batches)
                # 4. Rewards of tokens, 5. advantages and returns: over the responses of all ranks.
                unfinished.experience = with_advantages(experience, ppo, counters.kl_coef)
                clock.lap("score")

            # 6. Update actor and critic, a minibatch at a time.
            experience = unfinished.experience
            networks.train()
            minibatches = all_minibatches(experience, plan, iteration=counters.step, epochs=ppo.ppo_epochs)
            of_last: dict[str, float] = {}
            for minibatch in minibatches[counters.update :]:
                stopping, saving = all_reduce_sum([stop.received, save_clock.asks])
                if stopping:
                    leave()
                if saving:
                    save()
                seed_everything(job.seed, counters.step, counters.update, world.rank)
                seen = UpdateSums()
                outcome = update(networks, minibatch, experience, ppo, counters, seen, demonstrations)
                if average is not None and outcome.actor is not None and outcome.actor.applied:
                    average.update()
                total = seen.all_reduced()
                learned.add(total)
                of_last, of_update = outcome.metrics(), total.means()
                if counters.update == 0:
                    counters = replace(counters, first_ratio_error=of_update.get("val/ratio_off"))
                counters = counters.after_update(outcome.actor, outcome.critic)
                if outcome.is_skipped:
                    asked = [experience.responses[index].prompt_id for index in minibatch.responses]
                    places = [data.train.place(prompt_id) for prompt_id in dict.fromkeys(asked)]
                    report_skipped(outcome, counters, networks, of_update, places, job.model.dtype, progress)
                if ppo.target_kl is not None and of_update.get("policy/approxkl_avg", 0.0) > ppo.target_kl:
                    break
            clock.lap("learn")

            # 7. Move the KL coefficient.
            metrics = of_iteration(experience, ppo, counters, learned) | of_last
            kl_coef = next_coef(
                ppo.kl.controller, counters.kl_coef, metrics.get("objective/kl", 0.0), target=ppo.kl.target,
                horizon=ppo.kl.horizon, responses=len(experience.responses),
            )  # fmt: skip
            counters = counters.after_iteration(experience, kl_coef)
            unfinished.experience, learned = None, UpdateSums()

            metrics |= {
                "epoch": order.epoch_of(counters.step),
                **counters.totals(),
                **speed(
                    experience, sampler, clock,
                    flops_per_token=flops_per_token, dtype=job.model.dtype.value, world=world,
                ),
            }  # fmt: skip
            tracker.log(metrics, counters.step)
            progress.update(
                counters.step, tokens_per_second=metrics.get("perf/tokens_per_second"),
                numbers={"reward": metrics["objective/scores"], "KL": metrics.get("objective/kl")},
            )  # fmt: skip
            for line in watchdogs.look(counters.step, metrics):
                progress.log(f"warning: {line}")
            is_last = counters.step == total_steps
            if loop.is_due(counters.step, config.eval_every) or is_last:
                evaluate()
            if loop.is_due(counters.step, config.save_every) or is_last:
                save()

        # Save ----------------------------------------------------------------------------------
        enter("export")
        stop.deferred = False  # everything is saved: what is left can be done again
        networks.eval()
        probe = loop.probe_of(data.train[0], world.device)
        with swapped_in(average):
            with torch.no_grad():
                live_logits = networks.module.logits(probe)
            noise = noise_of(networks.module, list(probe), live_logits)
            weights = actor.full_state_dict()
            if weights is not None:
                final = loop.metrics_of_step(folder / METRICS_FILE, total_steps)
                for line in skipped_warnings(counters, job.model.dtype):
                    progress.log(line)
                export = export_policy(
                    networks.model,
                    weights,
                    tokenizer,
                    folder / "export",
                    details={
                        "parents": [parent_record(parent.path, run_dir) for parent in parents],
                        "resolved_config_hash": file_sha256(run_dir / "resolved.yaml"),
                        "data": fingerprints,
                        "progress": asdict(replace(counters, watchdogs={})),
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


def check_actor_learns(ppo: PPOConfig, iterations: int) -> None:
    """UserError when the critic's warm-up takes all iterations: the policy would end as it began."""
    warmup = ppo.critic.warmup_iterations
    if warmup >= iterations:
        raise UserError(
            f"ppo.critic.warmup_iterations={warmup} leaves nothing of the run's {iterations} iterations to "
            "the actor",
            hint="lower it, or raise ppo.train.max_steps (or ppo.train.epochs)",
        )
