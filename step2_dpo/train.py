"""DPO, read from top to bottom: load, data, learner, reference, loop, export.

Takes a `DPOJob` and a run's folder; leaves `<run>/dpo/` with metrics, samples, checkpoints and, when it is
finished, the policy under `export/`. How rows become tokens is in `data.py`, what the reference says of
them in `reference.py`, what is minimised in `loss.py`, what is measured in `evaluate.py`; mechanisms are in
`common/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.data.batches import PairBatches, count_pairs, evaluation_pair_batches
from common.data.dataset_types import PREFERENCES
from common.data.stored import PairDataset
from common.decoding.sampling import prompts_to_sample
from common.evidence import share_in_words, swapped_warning
from common.handoff import check_same_tokens, model_of
from common.model.architecture import CAUSAL_LM
from common.model.loading import disable_dropout
from common.model.packed import PackedCausalLM
from common.model.probes import find_shortcuts
from common.model.tokenizer import load_tokenizer
from common.stage import Input, Step
from common.training.frozen import frozen_settings
from common.training.loop import Loop, is_due
from common.training.session import Session, probe_of
from common.training.step_data import cache_dir
from step2_dpo.config import DPOJob
from step2_dpo.data import ChosenAnswers
from step2_dpo.evaluate import evaluate
from step2_dpo.loss import Objective, PairSums, StepCounts, compute_loss, step_loss
from step2_dpo.reference import load_or_compute, other_model, reference_key, starting_policy


def train(job: DPOJob, run_dir: Path) -> int:
    """Train the policy and export it. Returns 0; leaves by SystemExit(143) when told to stop, state saved."""
    # Load --------------------------------------------------------------------------------------
    dpo, train_config = job.dpo, job.dpo.train
    session = Session(job, Step.dpo, train_config, run_dir)
    world = session.world
    policy = session.load_artifact(dpo.policy, Input.policy)
    parents, compared_with = {Input.policy: policy}, policy
    if dpo.reference is not None:
        compared_with = parents[Input.reference] = session.load_artifact(dpo.reference, Input.reference)
        check_same_tokens(policy, compared_with)
    model_config = model_of(job.model, policy.path)
    tokenizer = load_tokenizer(model_config)
    data = session.load_data(dpo.data, PREFERENCES, tokenizer, policy=policy)
    if data.train.margins.any():
        session.say("note: the pairs have margins, which the reward model uses and DPO does not")
    model = session.load_network(CAUSAL_LM, model_config, tokenizer, dpo.data.max_length)
    disable_dropout(model)  # the policy's log-probabilities are compared with the reference's, one by one
    module = PackedCausalLM(model, find_shortcuts(model))

    # Batches -----------------------------------------------------------------------------------
    plan = session.batch_plan(dpo.data, share_prefix=module.shortcuts.shared_prefix)
    batches = PairBatches(data.train, plan, data.weights)
    total_steps = train_config.max_steps or batches.steps_in_epochs(train_config.epochs)
    answers = None if data.held_out is None else ChosenAnswers(data.held_out)
    prompts = prompts_to_sample(answers, dpo.sampling, model, job.seed)

    # Learner -----------------------------------------------------------------------------------
    objective = Objective.of(dpo)
    peak_lr = dpo.peak_lr(lora=job.model.lora.enabled)
    learner = session.build_learner(module, dpo.optim, peak_lr=peak_lr, steps=total_steps)
    engine = learner.engine

    # Reference ---------------------------------------------------------------------------------
    opened, settings = starting_policy(engine), model_config  # while the engine still holds it
    if dpo.reference is not None:
        opened, settings = other_model(job, compared_with, tokenizer, world), frozen_settings(model_config)
    key = reference_key(
        compared_with, settings, plan, data=data.fingerprints(), weights=data.weights, steps=total_steps,
        device=world.device,
    )  # fmt: skip
    reference = load_or_compute(
        opened, batches, data.held_out, total_steps, key, cache_dir(job, dpo.data) / "reference", world,
        session.say,
    )  # fmt: skip

    def evaluate_held_out(held_out: PairDataset, step: int) -> tuple[dict[str, float], str]:
        """What would be exported now, on held-out pairs; and a line that says it."""
        pairs = evaluation_pair_batches(held_out, plan)
        metrics = evaluate(engine, pairs, reference, objective, world.device)
        metrics |= session.sample(module, engine, tokenizer, prompts, dpo.sampling, step)
        return metrics, held_out_line(step, metrics, len(held_out), len(prompts))

    loop = Loop(session, learner, batches, data, total_steps, evaluate_held_out)
    loop.resume()
    with loop.training():
        # Loop ----------------------------------------------------------------------------------
        while loop.goes_on:
            micro_batches = loop.begin()
            _, tokens, computed, padding, *counted = loop.all_reduce(
                [*count_pairs(micro_batches), *StepCounts.of(micro_batches)]
            )
            counts, sums = StepCounts(*counted), PairSums()
            with_entropy = is_due(loop.counters.step + 1, train_config.entropy_every)
            for batch in micro_batches:
                known = reference.of_train(batch)
                result = compute_loss(
                    engine, batch, known, objective, world.device, with_entropy=with_entropy
                )
                engine.backward(step_loss(result, objective, counts), 1.0)
                sums.add(result, objective)
            loop.update(tokens, counts.response_tokens)
            metrics = sums.metrics(objective, counts, with_entropy=with_entropy)
            loop.log(metrics, padding=padding, computed=computed)
            loop.evaluate_and_save()

        # Export --------------------------------------------------------------------------------
        session.begin_export()
        part, pairs = "eval/", len(data.held_out or ())
        if data.held_out is None:
            part, pairs = "", train_config.global_batch_size
        loop.export(
            module, tokenizer, probe_of(data.train[0].chosen, world.device), parents=parents,
            final_lines=lambda final: [
                swapped_warning(
                    final, f"{part}rewards/accuracies", f"{part}rewards/margins", step=Step.dpo, pairs=pairs
                )
            ],
            extra_details=lambda final: {"reference": reference.record},
        )  # fmt: skip
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
