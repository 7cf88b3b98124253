"""Prompts as the model sees them: a seeded handful with the row's other columns, how long they are, and what
was dropped or cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.data import control
from common.data.types import TokenizedPrompt
from common.handoff import model_to_preview
from common.models import load_tokenizer
from common.progress import show_preview
from common.stage import Step
from common.step_data import build_data
from step3_ppo.config import PPOJob
from step3_ppo.data import kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPTS_SHOWN = 5
LONGEST_VALUE = 200  # characters of another column


def preview(job: PPOJob, folder: Path) -> None:
    """Print to the terminal. Tokenizes into the cache, where a run finds it again; loads no model.

    Before an earlier step of the run has made the policy, the base model's tokenizer counts.
    """
    tokenizer = load_tokenizer(model_to_preview(job.model, job.ppo.policy, "ppo.policy"))
    built = build_data(job, Step.ppo, job.ppo.data, kind_of(job), tokenizer, print)
    prompts = built.train
    shown = np.sort(np.random.default_rng(job.seed).permutation(len(prompts))[:PROMPTS_SHOWN])
    show_preview(
        [
            [
                (prompts.head(index), False),
                *prompt_runs(prompts[index], tokenizer, marked=bool(prompts.control[index])),
            ]
            for index in shown.tolist()
        ],
        prompts.lengths.tolist(),
        built.ledger.lines(),
        None,
        job.ppo.data.max_length - job.ppo.rollout.max_new_tokens,
    )


def prompt_runs(
    prompt: TokenizedPrompt, tokenizer: PreTrainedTokenizerFast, *, marked: bool = False
) -> list[tuple[str, bool]]:
    """The prompt, where the policy goes on, and what reward functions are told beside it.

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
