"""One rank that scores the responses of all: writes what it found, and was asked, to FOLDER/rank_R.json.

REWARD: an entry of `ppo.rewards`. Three prompts have two responses each, so the last of four ranks has none.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from common.artifacts import Artifact
from common.config import ModelConfig
from common.data.batches import BatchPlan
from common.data.types import Batch, TokenizedPrompt
from common.errors import UserError
from common.runtime.distributed import World, close_world, init_world
from common.stage import Role
from step3_ppo.config import EvaluationConfig, PPOConfig, RewardSourceConfig
from step3_ppo.evaluate import Evaluation
from step3_ppo.minibatches import batches_in
from step3_ppo.rewards.reading import reader_of
from step3_ppo.rewards.sources import Calibration
from step3_ppo.rollout import Experience, Response
from step3_ppo.scoring import Scoring
from tests.tiny import tiny_tokenizer

PROMPTS = ("one", "two", "three")
COMPLETIONS = ("a", "hello ok", "bc", "bcd", "hello hello hello", "")
SAMPLES = 2
ASKED: list[dict[str, Any]] = []
"""What this rank's function was given, call by call."""


def above_mean(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """How much longer a completion is than those of its prompt are on average."""
    ASKED.append({"prompts": prompts, "completions": completions, "columns": columns})
    lengths = {p: [len(c) for q, c in zip(prompts, completions, strict=True) if q == p] for p in prompts}
    return [len(c) - float(np.mean(lengths[p])) for p, c in zip(prompts, completions, strict=True)]


def broken_for_two(prompts: list[str], completions: list[str]) -> list[float]:
    if "two" in prompts:
        raise ValueError("no idea")
    return [0.0] * len(completions)


def few_for_two(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * (len(completions) - ("two" in prompts))


def words_for_two(prompts: list[str], completions: list[str]) -> list[Any]:
    return ["good" if prompt == "two" else 1.0 for prompt in prompts]


def missing_without_level(completions: list[str], level: list[int | None]) -> list[float]:
    return [float(each or 0) for each in level]


def rows() -> list[TokenizedPrompt]:
    """Only the last one has the column level."""
    columns: list[dict[str, object]] = [{"answer": "x"}, {"answer": "y"}, {"answer": "z", "level": 3}]
    ids = np.array([1, 20], np.int32)
    return [TokenizedPrompt(ids, text, has, "") for text, has in zip(PROMPTS, columns, strict=True)]


def responses() -> list[Response]:
    tokenizer, found = tiny_tokenizer(), []
    for index, text in enumerate(COMPLETIONS):
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        group, zeros = index // SAMPLES, np.zeros(len(ids), np.float32)
        found.append(Response(group, group, rows()[group].input_ids, np.array(ids, np.int32), zeros, True))
    return found


class Networks:
    """The reward model's score is exact in fp32: each token's id by its place."""

    has_reference, share_prefix = False, False

    def __init__(self, *, scores: bool) -> None:
        self.reward_model = SimpleNamespace(present=nullcontext) if scores else None

    def document_scores(self, batch: Batch) -> torch.Tensor:
        documents = torch.tensor_split(batch.input_ids[0], batch.cu_seqlens[1:-1].long())
        scores = torch.stack([(ids * torch.arange(1, len(ids) + 1)).sum() for ids in documents]).float()
        return scores[: len(batch.row_ids)]  # a filler batch has a document, and no response


def scoring_of(reward: dict[str, Any], scorer: str | None, world: World, plan: BatchPlan) -> Scoring:
    functions = {"above": f"{__name__}:above_mean"}
    ppo = PPOConfig(rewards=[RewardSourceConfig(**reward)], evaluation=EvaluationConfig(functions=functions))
    artifact = None if scorer is None else Artifact.load(Path(scorer), Role.reward_model)
    scoring = Scoring(ppo, artifact, tiny_tokenizer(), world, reader_of(ModelConfig(), artifact), plan)
    if artifact is not None:
        scoring.calibration = Calibration(0.0, 1e4)
    return scoring


def main(folder: str, reward: dict[str, Any], scorer: str | None = None) -> int:
    """scorer: a reward model that is given text, where it is the reward."""
    world = init_world()
    plan = BatchPlan(64, True, 4, 2, 0, world.rank, world.size)
    scoring = scoring_of(reward, scorer, world, plan)
    texts_of, pickled = _counted(scoring), _pickled()
    said: dict[str, Any] = {"error": None}
    experience, networks = Experience(responses()), Networks(scores=scorer is not None)
    try:
        texts = scoring.texts(experience.responses, rows())  # type: ignore[arg-type]
        scored = scoring.score(experience, texts, batches_in(experience, plan), networks)  # type: ignore[arg-type]
        assert scored.rewards is not None
        said |= {"scores": {name: each.tolist() for name, each in scored.scores.items()}}
        said |= {"rewards": scored.rewards.tolist(), "pickled": sorted(set(pickled))}
        said |= {"asked": list(ASKED), "decoded": list(texts_of["decoded"]), "read": list(texts_of["read"])}
        evaluation = Evaluation(rows(), range(3), scoring, plan, 0, SAMPLES)  # type: ignore[arg-type]
        said["metrics"], said["samples"] = evaluation(networks, _sample)  # type: ignore[arg-type]
    except UserError as error:
        said["error"] = str(error)
    (Path(folder) / f"rank_{world.rank}.json").write_text(json.dumps(said))
    close_world()
    return 0


def _sample(*_: Any, samples: int, **__: Any) -> list[Response]:
    return responses()[:: SAMPLES // samples]


def _counted(scoring: Scoring) -> dict[str, list[str]]:
    """The completions that this rank decodes, and those that it tokenizes for a reward model."""
    found: dict[str, list[str]] = {"decoded": [], "read": []}
    decode, read = scoring.completion, scoring._reader

    def decoding(response: Response) -> str:
        found["decoded"].append(decode(response))
        return found["decoded"][-1]

    def reading(prompts: Any, completions: Any, columns: Any) -> Any:
        found["read"].extend(completions)
        assert read is not None
        return read(prompts, completions, columns)

    scoring.completion = decoding  # type: ignore[method-assign]
    scoring._reader = None if read is None else reading  # type: ignore[assignment]
    return found


def _pickled() -> list[str]:
    """Types of what this rank lets be pickled for the others."""
    found: list[str] = []
    gather = torch.distributed.all_gather_object

    def gathering(into: Any, value: Any) -> None:
        found.append(type(value).__name__)
        gather(into, value)

    torch.distributed.all_gather_object = gathering
    return found
