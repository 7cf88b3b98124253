"""The weighted sum of rewards: what is calibrated, clipped, taken off, and refused."""

from __future__ import annotations

import http.server
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.fields import as_schema
from step3_ppo.config import RewardSourceConfig
from step3_ppo.rewards.sources import Calibration, RewardSources
from tests import served

PROMPTS, COMPLETIONS, GROUPS = ["a", "b"], ["yes", "no"], np.array([0, 0])
COLUMNS = {"answer": ["yes", "yes"]}
MODEL = RewardSourceConfig(model=True)
LENGTHS = RewardSourceConfig(function="reward_functions:lengths", weight=0.1)
RIGHT = RewardSourceConfig(function="reward_functions:right", weight=2.0, name="correct")
CALIBRATION = Calibration(mean=1.0, std=2.0)


@pytest.fixture(autouse=True)
def module_of_the_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    yield
    sys.modules.pop("reward_functions", None)


def total(
    sources: RewardSources, scores: dict[str, Any], stopped: list[bool], clip: float = 10.0
) -> list[float]:
    return sources.total(
        {name: np.asarray(values, np.float64) for name, values in scores.items()},
        np.array(stopped),
        missing_eos_penalty=1.0,
        reward_clip=clip,
        calibration=CALIBRATION if sources.has_model else None,
    ).tolist()


def test_each_source_is_scored_apart_and_raw() -> None:
    sources = RewardSources([MODEL, LENGTHS, RIGHT])
    sources.check(COLUMNS)
    scores = sources.score(PROMPTS, COMPLETIONS, COLUMNS, GROUPS, np.array([5.0, -1.0], np.float32))
    assert sources.names == list(scores) == ["reward_model", "lengths", "correct"]
    assert {name: values.tolist() for name, values in scores.items()} == {
        "reward_model": [5.0, -1.0], "lengths": [3.0, 2.0], "correct": [1.0, 0.0],
    }  # fmt: skip
    assert all(values.dtype == np.float64 for values in scores.values())


def test_the_reward_is_the_weighted_sum_of_the_calibrated_model_and_the_functions() -> None:
    sources = RewardSources([MODEL, LENGTHS, RIGHT])
    scores = {"reward_model": [5.0, -1.0], "lengths": [3.0, 2.0], "correct": [1.0, 0.0]}
    # (5 - 1)/2 + 0.1·3 + 2·1 and (-1 - 1)/2 + 0.1·2
    assert total(sources, scores, [True, True]) == pytest.approx([4.3, -0.8], abs=1e-15)


def test_a_response_that_did_not_stop_loses_the_penalty_once_whatever_the_sources() -> None:
    scores = {"reward_model": [1.0, 1.0], "lengths": [0.0, 0.0], "correct": [0.0, 0.0]}
    assert total(RewardSources([MODEL, LENGTHS, RIGHT]), scores, [True, False]) == [0.0, -1.0]
    assert total(RewardSources([RIGHT]), {"correct": [0.0, 0.0]}, [False, True]) == [-1.0, 0.0]


def test_only_the_models_rewards_are_clipped_and_before_they_are_weighted() -> None:
    model = RewardSourceConfig(model=True, weight=3.0)
    scores = {"reward_model": [101.0, -99.0], "lengths": [1000.0, 0.0]}
    # the model's ±50 deviations count as ±10, times 3; the function's 1000 counts as it is, times 0.1
    assert total(RewardSources([model, LENGTHS]), scores, [True, True]) == [130.0, -30.0]
    assert total(RewardSources([model]), {"reward_model": [101.0, 2.0]}, [True, True], 0.25) == [0.75, 0.75]


def test_the_reward_model_is_a_source_only_where_it_is_named() -> None:
    assert RewardSources([MODEL, RIGHT]).has_model and not RewardSources([RIGHT]).has_model
    assert list(RewardSources([RIGHT]).score(PROMPTS, COMPLETIONS, COLUMNS, GROUPS, None)) == ["correct"]


def test_sources_with_one_name_are_refused() -> None:
    twice = [LENGTHS, RewardSourceConfig(function="reward_functions:Judge.fair", name="lengths")]
    with pytest.raises(UserError, match="2 entries of ppo.rewards are called lengths"):
        RewardSources(twice)


def test_names_come_from_the_function_or_the_servers_host() -> None:
    sources = [
        RewardSourceConfig(function="reward_functions:Judge.fair"),
        RewardSourceConfig(url="https://rewards.example:8443/score"),
        RewardSourceConfig(url="http://127.0.0.1:8000/"),
    ]
    assert RewardSources(sources).names == ["fair", "rewards.example", "127.0.0.1"]


def test_a_function_that_is_not_there_is_found_out_at_the_start_with_its_place_in_the_list() -> None:
    with pytest.raises(UserError, match=r"ppo\.rewards\[1\]\.function=reward_functions:nothing_such"):
        RewardSources([MODEL, RewardSourceConfig(function="reward_functions:nothing_such")])
    with pytest.raises(UserError, match="takes answer, which is neither"):
        RewardSources([RIGHT]).check(["question"])


def test_what_cannot_name_a_function_or_a_server_is_refused_by_the_schema() -> None:
    for wrong in ({"function": "no colon"}, {"url": "http://rewards.example/"}, {"url": "nowhere"}):
        with pytest.raises(UserError, match=r"ppo\.rewards\[1\]\."):
            as_schema(RewardSourceConfig, wrong, "ppo.rewards[1].")
    with pytest.raises(UserError, match=r"ppo\.rewards\[1\] names nothing to score with"):
        as_schema(RewardSourceConfig, {}, "ppo.rewards[1].")


def test_a_score_of_the_model_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError, match="the reward model's score of 1 of 2 responses .* nan for 'no'"):
        RewardSources([MODEL]).score(PROMPTS, COMPLETIONS, {}, GROUPS, np.array([0.0, np.nan]))


def test_a_server_is_sent_four_requests_at_once_and_a_function_is_called_once_unless_settings_say_more() -> (
    None
):
    named = [{"url": "https://h/x"}, {"function": "a:b"}, {"function": "a:b", "concurrency": 7}]
    assert [RewardSourceConfig(**name).calls_at_once for name in named] == [4, 1, 7]
    seen: list[list[str]] = []

    def scorer(prompts: Any, completions: Any, columns: Any) -> Any:
        seen.append(completions)
        return np.zeros(len(completions))

    for concurrency, calls in ((None, [["yes", "no"]]), (2, [["no"], ["yes"]])):
        source = RewardSourceConfig(function="reward_functions:right", concurrency=concurrency)
        sources = RewardSources([source])
        sources._scorers = dict.fromkeys(sources.names, scorer)
        seen.clear()
        sources.score(PROMPTS, COMPLETIONS, COLUMNS, np.array([0, 1]), None)
        assert sorted(seen) == calls


def test_a_server_is_asked_with_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((body["completions"], self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"rewards": [0.25, 0.5]}')

        def log_message(self, *arguments: Any) -> None:
            pass

    monkeypatch.setenv("RLHF_REWARD_TOKEN_JUDGE", "secret")
    with served.serving(http.server.HTTPServer(("127.0.0.1", 0), Handler)) as url:
        source = RewardSourceConfig(url=f"{url}/", name="judge")
        scores = RewardSources([RIGHT, source]).score(PROMPTS, COMPLETIONS, COLUMNS, GROUPS, None)
    assert scores["judge"].tolist() == [0.25, 0.5] and seen == [(COMPLETIONS, "Bearer secret")]


def test_calibration_comes_from_the_manifest() -> None:
    details = {"calibration": {"mean": 0.5, "std": 2, "accuracy": 0.9}}
    found = Calibration.of(details, "reward/export")
    assert (found.mean, found.std) == (0.5, 2.0)
    assert found.apply(np.array([0.5, 2.5, 100.0, -100.0]), 10.0).tolist() == [0.0, 1.0, 10.0, -10.0]


@pytest.mark.parametrize("details", [{}, {"calibration": None}, {"calibration": {"mean": 0.0}}])
def test_a_reward_model_without_a_calibration_is_refused(details: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the reward model reward/export has no calibration"):
        Calibration.of(details, "reward/export")


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (float("nan"), 1.0), (0.0, float("inf")), (0.0, -1.0)])
def test_a_calibration_that_cannot_be_divided_by_is_refused(mean: float, std: float) -> None:
    with pytest.raises(UserError, match="cannot tell answers apart"):
        Calibration.of({"calibration": {"mean": mean, "std": std}}, "reward/export")
