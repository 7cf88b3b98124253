"""Completions of prompts, and their scores by functions and by a reward model.

Prompts are answered as `generate` answers them. Functions are those of PPO
(`step3_ppo/rewards/functions.py`). A reward model that reads text as the policy does is given the sampled
tokens, as in PPO; another one is given the prompt in its own chat template, the completion as text, and its
own terminator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from common.data.stored import PromptDataset
from common.decoding.decoder import Decoder
from common.decoding.generate import CHUNK_REQUESTS, complete, rule_of, text_of
from common.decoding.requests import Completion
from common.errors import UserError
from common.inference_config import EvaluationSettings
from common.model.tokenizer import terminators_of
from common.runtime.progress import Progress
from evaluation.subject import Subject
from evaluation.values import Measured, Values
from step3_ppo.rewards.functions import ScoreFunction, load_function

REWARD_MODEL = "reward_model"
MEASURED = ("length", "stop_rate", REWARD_MODEL)
"""Names that no function can have."""


@dataclass
class Answers:
    """What a policy said to the prompts of `keys`. scores: of each scorer by name, by row one per sample."""

    rows: PromptDataset
    keys: Mapping[str, int]
    completions: dict[str, list[Completion]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def measured(self) -> Measured:
        """Means over the samples of each prompt."""
        samples: dict[str, Mapping[str, Sequence[float]]] = {
            **self.scores,
            "length": {key: [len(each.tokens) for each in found] for key, found in self.completions.items()},
            "stop_rate": {key: [each.stopped for each in found] for key, found in self.completions.items()},
        }
        means = {
            name: {key: float(np.mean(of_prompt)) for key, of_prompt in found.items()}
            for name, found in samples.items()
        }
        return Measured(means, means)


def named_functions(references: Sequence[str]) -> dict[str, ScoreFunction]:
    """Functions by the last part of their names. UserError for two of one name, or for one that is taken."""
    found: dict[str, ScoreFunction] = {}
    for reference in references:
        function = load_function(reference, "--functions")
        name = reference.rpartition(":")[2].rpartition(".")[2]
        if name in found or name in MEASURED:
            raise UserError(
                f"--functions: {reference} would be the second number called {name}",
                hint="give it another name, e.g. in a module of your own: from package.module import f as g",
            )
        found[name] = function
    return found


def answer(
    subject: Subject, rows: PromptDataset, keys: Mapping[str, int], settings: EvaluationSettings
) -> Answers:
    """Sample completions of these prompts."""
    decoder = Decoder(subject.network(), slots=settings.slots)
    rule, answers = rule_of(settings, terminators_of(subject.tokenizer)), Answers(rows, keys)
    names, indices = {index: key for key, index in keys.items()}, list(keys.values())
    found: dict[int, list[Completion]] = {}
    with Progress(len(indices), label="answer") as progress:

        def ready(index: int, completions: list[Completion]) -> None:
            found[index] = completions
            progress.update(len(found))

        chunk = max(1, CHUNK_REQUESTS // settings.samples)
        for first in range(0, len(indices), chunk):
            complete(decoder, rows, indices[first : first + chunk], rule, settings, ready)
    answers.completions = {names[index]: found[index] for index in indices}
    answers.texts = {
        key: [text_of(each, subject.tokenizer) for each in said] for key, said in answers.completions.items()
    }
    return answers


def score_by_functions(answers: Answers, functions: Mapping[str, ScoreFunction]) -> None:
    """Add what each function says of the completions. UserError for a column that it needs and no row has."""
    prompts = {key: answers.rows[index] for key, index in answers.keys.items()}
    said = [(prompts[key], text) for key, texts in answers.texts.items() for text in texts]
    names = sorted({name for prompt, _ in said for name in prompt.columns})
    columns: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt, _ in said] for name in names}
    for name, function in functions.items():
        function.check(names)
        scores = iter(function([prompt.prompt for prompt, _ in said], [text for _, text in said], columns))
        answers.scores[name] = {
            key: [float(next(scores)) for _ in texts] for key, texts in answers.texts.items()
        }


@torch.no_grad()
def score_by_model(
    judge: Subject, prompts: Mapping[str, np.ndarray], asked: Sequence[tuple[Subject, Answers]]
) -> None:
    """Add the raw scores of a reward model, read at the last token of each completion."""
    module = judge.packed()
    total = sum(len(texts) for _, answers in asked for texts in answers.texts.values())
    with Progress(total, label="judge") as progress:
        done = 0
        for policy, answers in asked:
            found = answers.scores.setdefault(REWARD_MODEL, {})
            for key, completions in answers.completions.items():
                said = zip(completions, answers.texts[key], strict=True)
                found[key] = [
                    float(module.answers([_document(judge, policy, prompts[key], each, text)])[0])
                    for each, text in said
                ]
                progress.update(done := done + len(completions))


def _document(
    judge: Subject, policy: Subject, prompt: np.ndarray, completion: Completion, text: str
) -> torch.Tensor:
    """Prompt and completion as the reward model reads them: int64 [T] on its device."""
    if judge.reads_as(policy):
        ids = completion.tokens.tolist()
    else:
        ids = [
            *judge.tokenizer(text, add_special_tokens=False)["input_ids"],
            terminators_of(judge.tokenizer)[0],
        ]
    return torch.tensor([*prompt.tolist(), *ids], dtype=torch.int64, device=judge.device)


def wins(ours: Answers, theirs: Answers) -> Values:
    """`win_rate`: how often our samples have higher scores of the reward model than theirs; a tie is half."""
    if REWARD_MODEL not in ours.scores:
        return {}
    found = {}
    for key, scores in ours.scores[REWARD_MODEL].items():
        mine, other = np.array(scores)[:, None], np.array(theirs.scores[REWARD_MODEL][key])[None]
        found[key] = float(((mine > other) + 0.5 * (mine == other)).mean())
    return {"win_rate": found}
