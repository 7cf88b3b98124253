"""PPO, read from top to bottom: load, data, networks, loop, export.

Takes a `PPOJob` and a run's folder; leaves `<run>/ppo/` with metrics, samples, checkpoints and, when it is
finished, the policy under `export/`. The loop numbers the parts of an iteration as the algorithm does:

1. sample responses from the actor (rollout.py)              5. advantages and returns (advantages.py)
2. score them (scoring.py, rewards/)                         6. update actor and critic (update.py, loss.py)
3. log-probabilities, the reference's, values (networks.py)  7. move the KL coefficient (advantages.py)
4. rewards of tokens (advantages.py)

Proximal policy optimization (arXiv 1707.06347) as InstructGPT uses it (2203.02155), with the details that
"The N+ implementation details of RLHF with PPO" (2403.17031) found to matter. What is measured on held-out
prompts is in evaluate.py, when to save and to evaluate in iterations.py; mechanisms are in `common/`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from common.data.batches import Batches
from common.data.dataset_types import DEMONSTRATIONS
from common.errors import UserError
from common.handoff import check_same_tokens, model_of
from common.model.architecture import CAUSAL_LM
from common.model.tokenizer import load_tokenizer, terminators_of
from common.phases import enter
from common.runtime.performance import training_flops_per_token
from common.stage import Input, Step
from common.training.ema import swapped_in
from common.training.session import Session, probe_of
from step3_ppo.advantages import next_coef, with_advantages
from step3_ppo.calibrate import calibrate
from step3_ppo.config import PPOConfig, PPOJob
from step3_ppo.data import PromptOrder, dataset_type_of
from step3_ppo.evaluate import evaluation_of
from step3_ppo.importance import with_importance
from step3_ppo.iterations import Iterations
from step3_ppo.loss import UpdateSums
from step3_ppo.metrics import Stopwatch, of_iteration, speed
from step3_ppo.minibatches import all_minibatches, first_pass, updates_in
from step3_ppo.networks import build_networks
from step3_ppo.rewards.reading import reader_of
from step3_ppo.rollout import Experience, Sampler, vllm_of
from step3_ppo.scoring import Scoring
from step3_ppo.update import skipped_warnings, update


def train(job: PPOJob, run_dir: Path) -> int:
    """Train the policy and export it. Returns 0; leaves by SystemExit(143) when told to stop, state saved."""
    # Load --------------------------------------------------------------------------------------
    ppo = job.ppo
    session = Session(job, Step.ppo, ppo.train, run_dir)
    world, folder = session.world, session.folder
    for line in ppo.notes():
        session.say(f"note: {line}")
    policy = session.load_artifact(ppo.policy, Input.policy)
    parents, reward_model = {Input.policy: policy}, None
    if ppo.needs(Input.reward_model):
        reward_model = session.load_artifact(ppo.reward_model, Input.reward_model)
        check_same_tokens(policy, reward_model)  # it is given the policy's token ids, or text
        parents[Input.reward_model] = reward_model
    tokenizer = load_tokenizer(model_of(job.model, policy.path))
    data = session.load_data(ppo.data, dataset_type_of(job), tokenizer, policy=policy)
    plan = session.batch_plan(ppo.data)
    scoring = Scoring(ppo, reward_model, tokenizer, world, reader_of(job.model, reward_model), plan)
    scoring.check(data.train)
    if data.held_out is not None:
        scoring.check(data.held_out, held_out=True)

    # Data --------------------------------------------------------------------------------------
    order = PromptOrder(data.train, ppo.rollout.prompts, job.seed, data.weights)
    total_steps = ppo.iterations_over(order.prompts_per_epoch)
    if filling := ppo.filling(order.prompts_per_epoch):
        session.say(f"note: {filling}")
    check_actor_learns(ppo, total_steps)
    updates = updates_in(ppo.responses_per_iteration, plan, ppo.ppo_epochs)  # of an iteration, at most
    demonstrations, fingerprints = None, data.fingerprints()
    if ppo.ptx_weight:
        ptx = session.load_data(ppo.ptx_data, DEMONSTRATIONS, tokenizer, folder=folder / "ptx")
        ptx_plan = replace(session.batch_plan(ppo.ptx_data), global_batch_size=ppo.ptx_batch_size)
        demonstrations = Batches(ptx.train, ptx_plan, ptx.weights)
        of_ptx = ptx.fingerprints()
        fingerprints |= {"ptx": of_ptx["train"], "ptx_rows_sha256": of_ptx["rows_sha256"]}

    # Networks ----------------------------------------------------------------------------------
    session.rehearse_export(model_of(job.model, policy.path), CAUSAL_LM)
    networks = build_networks(
        job, policy, reward_model, tokenizer, world,
        actor_updates=updates * (total_steps - ppo.critic.warmup_iterations),
        critic_updates=updates * total_steps,
    )  # fmt: skip
    for name, learner in (("actor", networks.actor), ("critic", networks.critic)):
        if learner is not None:
            session.say(f"{name}: learning rate {learner.rates.in_words()}")
    session.say_adapted_layers(networks.model)
    plan = replace(plan, share_prefix=networks.share_prefix)
    evaluation = evaluation_of(data.held_out, scoring, plan, ppo.evaluation, job.seed)
    actor, flops_per_token = networks.actor.engine, training_flops_per_token(networks.model)
    terminators = terminators_of(tokenizer)
    files = model_of(job.model, policy.path)
    vllm = vllm_of(files, networks.model, ppo.rollout, ppo.data.max_length, world, folder / "handover")
    sampler = Sampler(actor, networks.model, ppo.rollout, terminators, world, session.stop, vllm)
    if reward_model is not None and scoring.needs_calibration:
        calibrate(
            scoring, reward_model, sampler, data.train, order.prompts_of(0), networks, folder, world,
            seed=job.seed, samples=ppo.rollout.samples_per_prompt, say=session.say,
        )  # fmt: skip
    run = Iterations(
        session, ppo, networks, sampler, evaluation,
        prompts=len(data.train), total_steps=total_steps, updates=updates,
    )  # fmt: skip
    with run.open():
        # Loop ----------------------------------------------------------------------------------
        while run.goes_on:
            iteration = run.begin()
            clock = Stopwatch(is_whole=run.experience is None)
            if run.experience is None:
                # 1. Sample responses from the actor.
                enter("rollout")
                prompt_ids = order.prompts_of(iteration)
                responses = sampler(
                    data.train, prompt_ids, key=(job.seed, iteration),
                    samples=ppo.rollout.samples_per_prompt, expected=run.lengths.of(prompt_ids),
                )  # fmt: skip
                if responses is None:
                    run.leave()
                run.lengths.note(responses)
                experience = Experience(responses)
                clock.lap("rollout")
                # 2. Score them, in the micro-batches in which part 6 sees them first.
                enter("score")
                batches = first_pass(experience, plan, iteration=iteration)
                texts = scoring.texts(responses, data.train)
                experience = scoring.score(experience, texts, batches, networks)
                # 3. Log-probabilities of the actor and the reference, and the critic's values.
                experience = networks.with_token_numbers(experience, batches)
                experience = with_importance(experience, ppo.rollout)
                # 4. Rewards of tokens, 5. advantages and returns: over the responses of all ranks.
                run.experience = with_advantages(experience, ppo, run.counters.kl_coef)
                clock.lap("score")

            # 6. Update actor and critic, a minibatch at a time.
            experience = run.experience
            networks.train()
            minibatches = all_minibatches(experience, plan, iteration=iteration, epochs=ppo.ppo_epochs)
            of_last: dict[str, float] = {}
            for minibatch in minibatches[run.counters.update :]:
                run.agree()
                seen = UpdateSums()
                outcome = update(networks, minibatch, experience, ppo, run.counters, seen, demonstrations)
                means = run.after_update(outcome, seen, minibatch, data.train)
                of_last = outcome.metrics()
                if ppo.target_kl is not None and means.get("policy/approxkl_avg", 0.0) > ppo.target_kl:
                    break
            clock.lap("learn")

            # 7. Move the KL coefficient.
            metrics = of_iteration(experience, ppo, run.counters, run.learned) | of_last
            kl_coef = next_coef(
                ppo.kl.controller, run.counters.kl_coef, metrics.get("objective/kl", 0.0),
                target=ppo.kl.target, horizon=ppo.kl.horizon, responses=len(experience.responses),
            )  # fmt: skip
            run.finish(kl_coef)
            run.record({
                **metrics,
                "epoch": order.epoch_of(run.counters.step),
                **run.counters.totals(),
                **speed(
                    experience, sampler, clock,
                    flops_per_token=flops_per_token, dtype=job.model.dtype.value, world=world,
                ),
            })  # fmt: skip

        # Export --------------------------------------------------------------------------------
        session.begin_export()
        networks.end_training()
        with swapped_in(run.average):
            session.export(
                networks.module, actor, tokenizer, probe_of(data.train[0], world.device),
                steps=run.counters.step, total_steps=total_steps, parents=parents, data=fingerprints,
                counters=asdict(replace(run.counters, watchdogs={})),
                final_lines=lambda final: skipped_warnings(run.counters, job.model.dtype),
            )  # fmt: skip
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
