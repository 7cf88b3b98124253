"""DataCounts of PPO's prompts and its schedule, before anything is started (`common/forecast.py`)."""

from __future__ import annotations

import logging
from pathlib import Path

from common.config import load_resolved
from common.counts import DataCounts
from common.forecast import of_prompts, to_read
from common.foresight import foresee_policy, foresee_scalar
from common.handoff import model_of, model_to_preview
from common.models import load_tokenizer
from common.stage import Role, Step
from common.step_data import build_data
from step3_ppo.config import PPOJob
from step3_ppo.data import PromptOrder, kind_of

log = logging.getLogger("rlhf.ppo")


def forecast(resolved: Path) -> DataCounts:
    """Of the job in `resolved`. Before there is a policy, the base model's tokenizer counts."""
    job = load_resolved(resolved, PPOJob)
    ppo = job.ppo
    reading = to_read(job, ppo.data)
    model = model_to_preview(job.model, ppo.policy, "ppo.policy")
    tokenizer = load_tokenizer(model)
    built = build_data(job, Step.ppo, reading.data, kind_of(job), tokenizer, log.info)
    order = PromptOrder(built.train, ppo.rollout.prompts, job.seed, reading.weights(built.weights))
    iterations = ppo.iterations_over(round(order.prompts_per_epoch * reading.scale))
    foresee_policy(model, samples=True)
    if ppo.has_critic or ppo.needs(Role.reward_model):
        foresee_scalar(model if ppo.reward_model is None else model_of(job.model, Path(ppo.reward_model)))
    return of_prompts(built, tokenizer, reading, ppo.train, order.prompts_per_epoch, iterations)
