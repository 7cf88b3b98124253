"""Before a run, without a model: `forecast` counts prompts and steps for `plan`; `preview` shows prompts.

A preview shows a seeded handful as the model sees them, their lengths, and the rows dropped or cut.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import load_resolved
from common.counts import DataCounts
from common.data import control
from common.data.types import TokenizedPrompt
from common.decoding.fallbacks import notice_fallbacks
from common.handoff import model_of, model_to_preview
from common.model.architecture import CAUSAL_LM
from common.model.scalar_head import NEW_REWARD_MODEL
from common.model.tokenizer import load_tokenizer
from common.runtime import progress
from common.stage import Input, Step
from common.training.forecast import of_prompts, to_read
from common.training.preview import a_few, show_preview
from common.training.step_data import build_data
from step3_ppo.config import PPOJob
from step3_ppo.data import PromptOrder, dataset_type_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONGEST_VALUE = 200  # characters of another column
log = logging.getLogger("rlhf.ppo")


def forecast(resolved: Path) -> DataCounts:
    """Counts of the job in `resolved`. Before there is a policy, the base model's tokenizer counts."""
    job = load_resolved(resolved, PPOJob)
    ppo = job.ppo
    reading = to_read(job, ppo.data)
    model = model_to_preview(job.model, ppo.policy, "ppo.policy")
    tokenizer = load_tokenizer(model)
    built = build_data(job, Step.ppo, reading.data, dataset_type_of(job), tokenizer, log.info)
    order = PromptOrder(built.train, ppo.rollout.prompts, job.seed, reading.weights(built.weights))
    iterations = ppo.iterations_over(round(order.prompts_per_epoch * reading.scale))
    notice_fallbacks(model, CAUSAL_LM, job.launch, samples=True)
    if ppo.has_critic or ppo.needs(Input.reward_model):
        scoring = model if ppo.reward_model is None else model_of(job.model, Path(ppo.reward_model))
        notice_fallbacks(scoring, NEW_REWARD_MODEL, job.launch)
    return of_prompts(built, tokenizer, reading, ppo.train, order.prompts_per_epoch, iterations)


def preview(job: PPOJob, folder: Path) -> None:
    """Print a preview. Tokenizes into the cache, where a run finds it again; loads no model.

    Before an earlier step of the run has made the policy, the base model's tokenizer counts.
    """
    tokenizer = load_tokenizer(model_to_preview(job.model, job.ppo.policy, "ppo.policy"))
    built = build_data(job, Step.ppo, job.ppo.data, dataset_type_of(job), tokenizer, progress.say)
    prompts = built.train
    show_preview(
        a_few(prompts, job.seed, lambda index, marked: prompt_runs(prompts[index], tokenizer, marked=marked)),
        prompts.lengths.tolist(),
        built.ledger.lines(),
        None,
        job.ppo.data.max_length - job.ppo.rollout.max_new_tokens,
    )


def prompt_runs(
    prompt: TokenizedPrompt, tokenizer: PreTrainedTokenizerFast, *, marked: bool = False
) -> list[tuple[str, bool]]:
    """The prompt, which the policy continues, and the other columns, which reward functions get.

    marked: with control tokens between stars.
    """
    others = "".join(f"\n{name}: {_shown(value)}" for name, value in prompt.columns.items())
    return [
        (f"prompt ({len(prompt.input_ids)} tokens):\n", False),
        (control.spelled(prompt.input_ids.tolist(), tokenizer, marked=marked), False),
        (f"\nother columns:{others}" if others else "\nother columns: none", False),
    ]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
