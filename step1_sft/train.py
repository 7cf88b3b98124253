"""SFT, read from top to bottom: load, data, learner, loop, export.

Takes an `SFTJob` and a run's folder; leaves `<run>/sft/` with metrics, samples, checkpoints and, when it
is finished, the policy under `export/`. How rows become tokens is in `data.py`, what is minimised in
`loss.py`, what is measured in `evaluate.py`; mechanisms are in `common/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.data.batches import evaluation_batches
from common.data.dataset_types import DEMONSTRATIONS
from common.data.stored import TokenizedDataset
from common.data.stream_batches import training_batches
from common.decoding.sampling import prompts_to_sample
from common.model.architecture import CAUSAL_LM
from common.model.packed import PackedCausalLM
from common.model.probes import find_shortcuts
from common.stage import Step
from common.training.loop import Loop, is_due
from common.training.session import Session, probe_of
from step1_sft.config import SFTJob
from step1_sft.data import count_tokens, load_sft_tokenizer
from step1_sft.evaluate import evaluate
from step1_sft.loss import TokenSums, compute_loss


def train(job: SFTJob, run_dir: Path) -> int:
    """Train the policy and export it. Returns 0; leaves by SystemExit(143) when told to stop, state saved."""
    # Load --------------------------------------------------------------------------------------
    sft, train_config = job.sft, job.sft.train
    session = Session(job, Step.sft, train_config, run_dir)
    world = session.world
    parents = session.load_base_artifact(job.model)
    tokenizer = load_sft_tokenizer(job, session.folder, world.local_rank, session.say)
    data = session.load_data(sft.data, DEMONSTRATIONS, tokenizer)
    model = session.load_network(CAUSAL_LM, job.model, tokenizer, sft.data.max_length)
    module = PackedCausalLM(model, find_shortcuts(model))

    # Batches -----------------------------------------------------------------------------------
    plan = session.batch_plan(sft.data)
    batches = training_batches(data.train, plan, data.weights)
    total_steps = train_config.max_steps or batches.steps_in_epochs(train_config.epochs)
    prompts = prompts_to_sample(data.held_out, sft.sampling, model, job.seed)

    # Learner -----------------------------------------------------------------------------------
    peak_lr = sft.peak_lr(lora=job.model.lora.enabled)
    learner = session.build_learner(module, sft.optim, peak_lr=peak_lr, steps=total_steps)
    engine = learner.engine

    def evaluate_held_out(held_out: TokenizedDataset, step: int) -> tuple[dict[str, float], str]:
        """What would be exported now, on held-out rows; and a line that says it."""
        metrics = evaluate(engine, evaluation_batches(held_out, plan), held_out.sources, world.device)
        metrics |= session.sample(module, engine, tokenizer, prompts, sft.sampling, step)
        return metrics, held_out_line(step, metrics, len(held_out), len(prompts))

    loop = Loop(session, learner, batches, data, total_steps, evaluate_held_out)
    loop.resume()
    with loop.training():
        # Loop ----------------------------------------------------------------------------------
        while loop.goes_on:
            micro_batches = loop.begin()
            tokens, trained, padding = loop.all_reduce(count_tokens(micro_batches))
            sums = TokenSums()
            with_entropy = is_due(loop.counters.step + 1, train_config.entropy_every)
            for batch in micro_batches:
                result = compute_loss(engine, batch, world.device, with_entropy=with_entropy)
                engine.backward(result.loss_sum, trained)
                sums.add(result)
            loop.update(tokens, trained)
            loop.log(sums.means(trained, with_entropy=with_entropy), padding=padding)
            loop.evaluate_and_save()

        # Export --------------------------------------------------------------------------------
        session.begin_export()
        loop.export(module, tokenizer, probe_of(data.train[0], world.device), parents=parents)
    return 0


def held_out_line(step: int, metrics: Mapping[str, float], documents: int, samples: int) -> str:
    """An evaluation in one line; documents, samples: how many it is of."""
    stop_rate = metrics.get("eval/stop_rate")
    stopped = "" if stop_rate is None else f", {stop_rate:.0%} of {samples} samples stop"
    return (
        f"held out, step {step}: loss {metrics['eval/loss']:.4f} on {documents:,} documents, "
        f"token accuracy {metrics['eval/mean_token_accuracy']:.1%}{stopped}"
    )
