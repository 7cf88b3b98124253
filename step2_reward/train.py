"""The reward model, read from top to bottom: load, data, learner, loop, export.

Takes a `RewardJob` and a run's folder; leaves `<run>/reward/` with metrics, checkpoints and, when it is
finished, the reward model under `export/`. How rows become tokens is in `data.py`, what is minimised in
`loss.py`, what is measured in `evaluate.py`; mechanisms are in `common/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.data.batches import PairBatches, count_pairs, evaluation_pair_batches
from common.data.dataset_types import PREFERENCES
from common.data.stored import PairDataset
from common.evidence import share_in_words, swapped_warning
from common.handoff import model_of
from common.model.probes import find_shortcuts
from common.model.scalar_head import NEW_REWARD_MODEL, PackedScalarModel
from common.model.tokenizer import load_tokenizer
from common.stage import Input, Step
from common.training.loop import Loop
from common.training.session import Session
from step2_reward.config import RewardConfig, RewardJob
from step2_reward.data import PairSubset, probe_documents
from step2_reward.evaluate import calibration, held_out_metrics, score_pairs
from step2_reward.loss import ScoredPairs, pair_losses, score, step_metrics

CALIBRATION_PAIRS = 128
"""Training pairs that calibrate the rewards when none are held out, at most."""


def train(job: RewardJob, run_dir: Path) -> int:
    """Train the reward model and export it. Returns 0; leaves by SystemExit(143) when told to stop, state
    saved."""
    # Load --------------------------------------------------------------------------------------
    reward, train_config, centering = job.reward, job.reward.train, job.reward.center_rewards_coefficient
    session = Session(job, Step.reward, train_config, run_dir)
    world = session.world
    policy = session.load_artifact(reward.policy, Input.policy)
    model_config = model_of(job.model, policy.path)
    tokenizer = load_tokenizer(model_config)
    data = session.load_data(reward.data, PREFERENCES, tokenizer, policy=policy)
    model = session.load_network(NEW_REWARD_MODEL, model_config, tokenizer, reward.data.max_length)
    module = PackedScalarModel(model, find_shortcuts(model))

    # Batches -----------------------------------------------------------------------------------
    plan = session.batch_plan(reward.data, share_prefix=module.shortcuts.shared_prefix)
    batches = PairBatches(data.train, plan, data.weights)
    total_steps = train_config.max_steps or batches.steps_in_epochs(train_config.epochs)

    # Learner -----------------------------------------------------------------------------------
    peak_lr = reward.peak_lr(lora=job.model.lora.enabled)
    learner = session.build_learner(module, reward.optim, peak_lr=peak_lr, steps=total_steps)
    engine = learner.engine

    def evaluate(pairs: PairDataset | PairSubset) -> dict[str, float]:
        """What would be exported now, on pairs."""
        scored = score_pairs(engine, evaluation_pair_batches(pairs, plan), world.device)
        return held_out_metrics(scored, pairs.sources, centering)

    def evaluate_held_out(held_out: PairDataset, step: int) -> tuple[dict[str, float], str]:
        """The same on those that are held out; and a line that says it."""
        metrics = evaluate(held_out)
        return metrics, held_out_line(step, metrics, len(held_out))

    loop = Loop(session, learner, batches, data, total_steps, evaluate_held_out)
    loop.resume()
    with loop.training():
        # Loop ----------------------------------------------------------------------------------
        while loop.goes_on:
            micro_batches = loop.begin()
            pairs, tokens, computed, padding = loop.all_reduce(count_pairs(micro_batches))
            scored = []
            for batch in micro_batches:
                scores = score(engine, batch, world.device)
                losses = pair_losses(scores, batch.margins.to(world.device, non_blocking=True), centering)
                engine.backward(losses.sum(), pairs)
                scored.append(ScoredPairs.of(batch, scores))
            loop.update(tokens)
            metrics = step_metrics(ScoredPairs.all_gathered(scored), centering)
            loop.log(metrics, padding=padding, computed=computed)
            loop.evaluate_and_save()

        # Export --------------------------------------------------------------------------------
        session.begin_export()
        on_held_out = data.held_out is not None
        calibrating = data.held_out or PairSubset(data.train, CALIBRATION_PAIRS, job.seed)
        measured = (
            {} if on_held_out else evaluate(calibrating)
        )  # of held-out pairs the last step's metrics tell
        loop.export(
            module, tokenizer, probe_documents(data.train, world.device), parents={Input.policy: policy},
            final_lines=lambda final: closing_lines(
                measured or final, reward, len(calibrating), on_held_out=on_held_out
            ),
            extra_details=lambda final: {"calibration": calibration(measured or final, len(calibrating))},
        )  # fmt: skip
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
    swapped = swapped_warning(metrics, "eval/accuracy", "eval/margin", step=Step.reward, pairs=pairs)
    if swapped and on_held_out:
        lines.append(swapped)
    elif accuracy < least:
        lines.append(
            f"warning: the reward model orders {share_in_words(accuracy, pairs, f'{which} pairs')} as people "
            f"did, less than reward.warn_below_accuracy={least}: a policy trained on it would follow its "
            "mistakes"
        )
    return lines
