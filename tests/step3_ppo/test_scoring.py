"""What reward functions are told of responses, and what becomes of their answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from common.data.types import TokenizedPrompt
from common.errors import UserError
from common.runtime.distributed import World
from step3_ppo.config import EvaluationConfig, PPOConfig, RewardSourceConfig
from step3_ppo.rollout import Experience, Response
from step3_ppo.scoring import Scoring, same_score_for_same_tokens
from tests.tiny import tiny_tokenizer

ALONE = World(0, 1, 0, torch.device("cpu"))
HERE = "tests.step3_ppo.test_scoring"
SEEN: list[dict[str, Any]] = []


def telling(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    SEEN.append({"prompts": list(prompts), "completions": list(completions), **columns})
    return [float(len(completion)) for completion in completions]


def wants_answer(completions: list[str], answer: list[str]) -> list[float]:
    return [0.0] * len(completions)


class NoNetworks:
    reward_model = None


def scoring_of(function: str = "telling", **evaluation: str) -> Scoring:
    functions = {name: f"{HERE}:{reference}" for name, reference in evaluation.items()}
    ppo = PPOConfig(
        rewards=[RewardSourceConfig(function=f"{HERE}:{function}", weight=2.0)],
        evaluation=EvaluationConfig(functions=functions),
        missing_eos_penalty=0.5,
    )
    return Scoring(ppo, None, tiny_tokenizer(), ALONE)


def rows() -> list[TokenizedPrompt]:
    """Two prompts with different columns; the second is a list of turns."""
    ids = np.array([1, 20], np.int32)
    turns = [{"role": "user", "content": "hi"}]
    return [
        TokenizedPrompt(ids, "say ok", {"answer": "ok", "level": 2}, ""),
        TokenizedPrompt(ids, turns, {"answer": "hello"}, ""),
    ]


def experience() -> Experience:
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    of_prompt = ((1, "hello", True), (0, "ok", False), (1, "", True))
    responses = []
    for group, (prompt_id, text, stopped) in enumerate(of_prompt):
        ids = [*tokenizer.encode(text, add_special_tokens=False), *([end] if stopped else [])]
        tokens = np.array(ids, np.int32)
        logprobs = np.zeros(len(ids), np.float32)
        responses.append(Response(prompt_id, group, rows()[prompt_id].input_ids, tokens, logprobs, stopped))
    return Experience(responses)


def scored_by(scoring: Scoring) -> Experience:
    texts = scoring.texts(experience().responses, rows())  # type: ignore[arg-type]
    return scoring.score(experience(), texts, [], NoNetworks())  # type: ignore[arg-type]


def test_functions_are_told_prompts_as_the_rows_had_them_and_completions_without_their_terminator() -> None:
    SEEN.clear()
    scored = scored_by(scoring_of())
    turns = [{"role": "user", "content": "hi"}]
    assert [
        {
            "prompts": [turns, "say ok", turns],
            "completions": ["hello", "ok", ""],
            "answer": ["hello", "ok", "hello"],
            "level": [None, 2, None],
        }
    ] == SEEN
    assert scored.scores["telling"].tolist() == [5.0, 2.0, 0.0]
    assert scored.rewards is not None
    assert scored.rewards.tolist() == [10.0, 4.0 - 0.5, 0.0]  # only the second did not stop


def test_special_tokens_that_were_sampled_are_no_text() -> None:
    tokenizer = tiny_tokenizer()
    middle = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = [*tokenizer.encode("ok", add_special_tokens=False), middle]
    response = Response(
        0, 0, rows()[0].input_ids, np.array(ids, np.int32), np.zeros(len(ids), np.float32), False
    )
    assert scoring_of().texts([response], rows()).completions == ["ok"]  # type: ignore[arg-type]


def test_what_is_only_looked_at_is_no_part_of_the_reward() -> None:
    scoring = scoring_of(gold="wants_answer", size="telling")
    texts = scoring.texts(experience().responses, rows())  # type: ignore[arg-type]
    looked = scoring.look(texts)
    assert {name: scores.tolist() for name, scores in looked.items()} == {
        "gold": [0.0, 0.0, 0.0],
        "size": [5.0, 2.0, 0.0],
    }
    assert list(scored_by(scoring).scores) == ["telling"]


class Rows(list[TokenizedPrompt]):
    """Rows of one source each."""

    @property
    def source_ids(self) -> np.ndarray:
        return np.arange(len(self))


@pytest.mark.parametrize("setting", [{"function": "wants_answer"}, {"gold": "wants_answer"}])
def test_a_column_that_is_missing_is_said_before_anything_is_sampled(setting: dict[str, str]) -> None:
    scoring = scoring_of(**setting)
    scoring.check(Rows(rows()))  # type: ignore[arg-type]
    without = Rows([TokenizedPrompt(np.array([1], np.int32), "a", {"level": 1}, "")])
    with pytest.raises(UserError, match="takes answer, which is neither prompts nor completions"):
        scoring.check(without)  # type: ignore[arg-type]


def test_responses_that_are_the_same_have_the_same_score_whatever_their_batches_round() -> None:
    def response(prompt_id: int, *tokens: int) -> Response:
        prompt = np.array([1], np.int32)
        return Response(prompt_id, 0, prompt, np.array(tokens, np.int32), np.zeros(len(tokens)), True)

    responses = [response(0, 5, 2), response(0, 5, 2), response(1, 5, 2), response(0, 5), response(0, 5, 2)]
    scores = np.array([0.5, 0.5 + 1e-7, 0.25, 0.125, 0.5 - 1e-7])
    assert same_score_for_same_tokens(responses, scores).tolist() == [0.5, 0.5, 0.25, 0.125, 0.5]
