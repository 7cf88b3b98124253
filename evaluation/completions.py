"""Completions of prompts, and their scores by functions and by a reward model.

Prompts are answered as `generate` answers them. Functions are those of PPO
(`step3_ppo/rewards/functions.py`). As in PPO a reward model is given the sampled tokens, and text where it
reads others than the policy (`step3_ppo/rewards/reading.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from common.data.stored import PromptDataset
from common.decoding.generate import CHUNK_REQUESTS, complete, decoder_of, text_of
from common.decoding.requests import Completion, SamplingParams
from common.errors import UserError
from common.handoff import scores_text
from common.inference_config import EvaluationSettings
from common.model.tokenizer import terminators_of
from common.runtime.progress import Progress
from evaluation.inference_model import InferenceModel
from evaluation.values import Measured, Values
from step3_ppo.rewards.functions import ScoreFunction, load_function
from step3_ppo.rewards.reading import TextReader

REWARD_MODEL = "reward_model"
MEASURED = ("length", "stop_rate", REWARD_MODEL)
"""Names that no function can have."""


@dataclass
class PolicyCompletions:
    """What a policy said to the prompts of `keys`. scores: of each scorer by name, by row one per sample."""

    rows: PromptDataset
    keys: Mapping[str, int]
    completions: dict[str, list[Completion]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def given(self) -> tuple[list[Any], list[str], dict[str, list[Any]]]:
        """Prompts, completions and columns as reward functions get them: a prompt's samples side by side."""
        prompts = [self.rows[self.keys[key]] for key, texts in self.texts.items() for _ in texts]
        names = sorted({name for prompt in prompts for name in prompt.columns})
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        completions = [text for texts in self.texts.values() for text in texts]
        return [prompt.prompt for prompt in prompts], completions, columns

    def note(self, name: str, scores: Sequence[float]) -> None:
        """Keep the scores of a scorer, in the order of `given`."""
        of_all = iter(scores)
        self.scores[name] = {key: [next(of_all) for _ in texts] for key, texts in self.texts.items()}

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


def check_columns(
    rows: PromptDataset, indices: Iterable[int], functions: Mapping[str, ScoreFunction]
) -> None:
    """UserError when a function needs a column that none of these rows has; before anything is sampled."""
    columns = sorted({name for index in indices for name in rows[index].columns})
    for function in functions.values():
        function.check(columns)


def answer(
    model: InferenceModel, rows: PromptDataset, keys: Mapping[str, int], settings: EvaluationSettings
) -> PolicyCompletions:
    """Sample completions of these prompts."""
    params = SamplingParams.of(settings, terminators_of(model.tokenizer))
    answers = PolicyCompletions(rows, keys)
    names, indices = {index: key for key, index in keys.items()}, list(keys.values())
    found: dict[int, list[Completion]] = {}
    decoding = decoder_of(model.config, model.network, rows, settings, model.device)
    with Progress(len(indices), label="answer") as progress, decoding as decoder:

        def ready(index: int, completions: list[Completion]) -> None:
            found[index] = completions
            progress.update(len(found))

        chunk = max(1, CHUNK_REQUESTS // settings.samples)
        for first in range(0, len(indices), chunk):
            complete(decoder, rows, indices[first : first + chunk], params, settings, ready)
    answers.completions = {names[index]: found[index] for index in indices}
    answers.texts = {
        key: [text_of(each, model.tokenizer) for each in said] for key, said in answers.completions.items()
    }
    return answers


def score_by_functions(answers: PolicyCompletions, functions: Mapping[str, ScoreFunction]) -> None:
    """Add what each function says of the completions."""
    prompts, completions, columns = answers.given()
    for name, function in functions.items():
        answers.note(name, function(prompts, completions, columns).tolist())


@torch.no_grad()
def score_by_model(judge: InferenceModel, asked: Sequence[tuple[InferenceModel, PolicyCompletions]]) -> None:
    """Add the raw scores of a reward model, read at the last token of each completion."""
    module, done = judge.packed(), 0
    read = [_documents(judge, policy, answers) for policy, answers in asked]
    with Progress(sum(map(len, read)), label="judge") as progress:
        for (_, answers), documents in zip(asked, read, strict=True):
            scores = []
            for ids in documents:
                document = torch.from_numpy(ids.astype(np.int64)).to(judge.device)
                scores.append(float(module.answers([document])[0]))
                progress.update(done := done + 1)
            answers.note(REWARD_MODEL, scores)


def _documents(judge: InferenceModel, policy: InferenceModel, answers: PolicyCompletions) -> list[np.ndarray]:
    """Prompts with completions as the reward model reads them: int [T] each, in the order of `given`."""
    if scores_text(judge.artifact) or not judge.reads_as(policy):
        return TextReader(judge.artifact, judge.tokenizer)(*answers.given())
    return [
        np.concatenate([answers.rows[answers.keys[key]].input_ids, completion.tokens])
        for key, completions in answers.completions.items()
        for completion in completions
    ]


def wins(ours: PolicyCompletions, theirs: PolicyCompletions) -> Values:
    """`win_rate`: how often our samples have higher scores of the reward model than theirs; a tie is half."""
    if REWARD_MODEL not in ours.scores:
        return {}
    found = {}
    for key, scores in ours.scores[REWARD_MODEL].items():
        mine, other = np.array(scores)[:, None], np.array(theirs.scores[REWARD_MODEL][key])[None]
        found[key] = float(((mine > other) + 0.5 * (mine == other)).mean())
    return {"win_rate": found}
