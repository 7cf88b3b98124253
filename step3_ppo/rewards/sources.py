"""The reward of a response: a weighted sum of the reward model, Python functions and servers.

Takes `ppo.rewards` and checks every source before anything is trained: functions are imported, URLs and names
checked. `score` gives the raw scores of each source, logged apart; `total` the reward of each response. The
reward model's raw scores come from outside (a packed forward pass of all ranks). Nothing here knows of ranks:
the caller asks on each rank for the responses that it sampled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from common.errors import UserError
from step3_ppo.rewards.calls import Scorer, in_whole_groups
from step3_ppo.rewards.config import RewardSourceConfig
from step3_ppo.rewards.functions import Columns, Prompts, ScoreFunction, load_function
from step3_ppo.rewards.server import RewardServer, token_of

REWARD_MODEL = "reward_model"
"""Default name of the reward model's scores."""


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of a reward model's scores on held-out pairs."""

    mean: float
    std: float

    @classmethod
    def of(cls, details: Mapping[str, Any], path: object) -> Calibration:
        """From the details of a reward model's manifest; `path` is the artifact, for the message.

        UserError when it is missing, or its standard deviation is 0. Raw scores have any size; clipping,
        penalty and KL coefficient count in standard deviations.
        """
        found = details.get("calibration")
        try:
            mean, std = float(found["mean"]), float(found["std"])  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"the reward model {path} has no calibration: its manifest lacks the mean and the standard "
                "deviation of its scores",
                hint="train it with the reward step, which measures them: 'steps=[reward]'",
            ) from None
        if not math.isfinite(mean) or not math.isfinite(std) or std <= 0:
            raise UserError(
                f"the reward model {path} cannot tell answers apart: its scores on held-out pairs have "
                f"mean {mean:g} and standard deviation {std:g}",
                hint="train it again, longer or with another reward.optim.lr",
            )
        return cls(mean, std)

    def apply(self, scores: np.ndarray, clip: float) -> np.ndarray:
        """(score − mean) / std, at most `clip` either way."""
        return np.clip((scores - self.mean) / self.std, -clip, clip)


class RewardSources:
    """The sources of `ppo.rewards`, ready to score.

    UserError for a function that does not exist, a URL that is not allowed, and two sources with one name.
    """

    def __init__(self, configs: Sequence[RewardSourceConfig]) -> None:
        self._names = _names_of(configs)
        self._weights = dict(zip(self._names, (config.weight for config in configs), strict=True))
        self._concurrency = dict(zip(self._names, (config.calls_at_once for config in configs), strict=True))
        self._scorers: dict[str, Scorer | None] = {
            name: _scorer_of(config, f"ppo.rewards[{index}]", name, configs)
            for index, (name, config) in enumerate(zip(self._names, configs, strict=True))
        }

    @property
    def names(self) -> list[str]:
        """Names of the sources, in the configuration's order; the keys of `score`."""
        return list(self._names)

    @property
    def has_model(self) -> bool:
        """Whether the reward model is one of them."""
        return None in self._scorers.values()

    def check(self, columns: Iterable[str]) -> None:
        """UserError when a function needs a column that the rows do not have."""
        names = list(columns)
        for scorer in self._scorers.values():
            if isinstance(scorer, ScoreFunction):
                scorer.check(names)

    def score(
        self,
        prompts: Prompts,
        completions: Sequence[str],
        columns: Columns,
        groups: np.ndarray,
        model_scores: np.ndarray | None,
    ) -> dict[str, np.ndarray]:
        """Raw scores of each source by name, float64 [B], all finite.

        prompts: as the rows had them. completions: text without the terminator. columns: the rows' other
        columns, each a list [B]. groups: int64 [B], the responses to one prompt share one. model_scores: [B],
        needed when the reward model is a source.
        """
        scores = {}
        for name, scorer in self._scorers.items():
            if scorer is not None:
                scores[name] = in_whole_groups(
                    scorer, prompts, completions, columns, groups, self._concurrency[name]
                )
            else:
                assert model_scores is not None and len(model_scores) == len(completions)
                scores[name] = np.asarray(model_scores, np.float64)
                _check_finite(scores[name], completions)
        return scores

    def total(
        self,
        scores: Mapping[str, np.ndarray],
        stopped: np.ndarray,
        *,
        missing_eos_penalty: float,
        reward_clip: float,
        calibration: Calibration | None,
    ) -> np.ndarray:
        """float64 [B]: Σ weight · score, less `missing_eos_penalty` where a response did not stop.

        The reward model's scores are calibrated and clipped to ±reward_clip first; the others count as they
        are. stopped: bool [B]. calibration: of the reward model, needed when it is a source.
        """
        total = -missing_eos_penalty * (~np.asarray(stopped, bool)).astype(np.float64)
        for name, scorer in self._scorers.items():
            part = scores[name]
            if scorer is None:
                assert calibration is not None
                part = calibration.apply(part, reward_clip)
            total += self._weights[name] * part
        return total


def _names_of(configs: Sequence[RewardSourceConfig]) -> list[str]:
    """The sources' names. UserError when two are the same."""
    names = [_name_of(config) for config in configs]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(
                f"{count} entries of ppo.rewards are called {name} in the metrics",
                hint="give them names of their own: {…, name: first}",
            )
    return names


def _name_of(config: RewardSourceConfig) -> str:
    if config.name is not None:
        return config.name
    if config.model:
        return REWARD_MODEL
    if config.function is not None:
        return config.function.rpartition(":")[2].rpartition(".")[2]
    assert config.url is not None
    return urlsplit(config.url).hostname or config.url


def _scorer_of(
    config: RewardSourceConfig, key: str, name: str, configs: Sequence[RewardSourceConfig]
) -> Scorer | None:
    """A function or a server; None for the reward model, whose scores come from outside."""
    if config.function is not None:
        return load_function(config.function, f"{key}.function")
    if config.url is None:
        return None
    token = token_of(name, is_only_server=sum(other.url is not None for other in configs) == 1)
    return RewardServer(
        config.url, f"{key}.url", config.timeout, config.retries, allow_http=config.allow_http, token=token
    )


def _check_finite(scores: np.ndarray, completions: Sequence[str]) -> None:
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        first = int(wrong[0])
        raise UserError(
            f"the reward model's score of {len(wrong)} of {len(scores)} responses is not a finite number, "
            f"the first {scores[first]} for {completions[first][:60]!r}",
            hint="a half-precision overflow goes away with model.dtype=bf16 or fp32; else train it again",
        )
