"""Roll-outs of a small random model on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.decoding.decoder import Decoder
from common.decoding.requests import SamplingParams
from common.runtime.distributed import World
from step3_ppo.config import RolloutConfig
from step3_ppo.lengths import shared_out
from step3_ppo.rollout import roll_out
from tests import forked
from tests.common.model.test_attention import CONFIGS, tiny
from tests.programs import roll_out as program
from tests.programs.roll_out import EXPECTED, PROMPT_IDS, prompts

ALONE = World(0, 1, 0, torch.device("cpu"))
SAMPLES = 3


def on_ranks(folder: Path, case: str, size: int) -> list[dict[str, Any]]:
    """What every rank wrote."""
    folder.mkdir()
    forked.run(program.main, (str(folder), case), size, folder / "output.txt")
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(tmp_path_factory.mktemp("ranks") / "alone", "shares", 1)[0]


def test_responses_come_by_prompt_and_then_by_sample(alone: dict[str, Any]) -> None:
    responses = alone["responses"]
    assert [group for _, group, *_ in responses] == [
        g for g in range(len(PROMPT_IDS)) for _ in range(SAMPLES)
    ]
    for prompt_id, group, prompt, tokens, logprobs, _ in responses:
        assert prompt_id == PROMPT_IDS[group]
        assert prompt == prompts()[prompt_id].input_ids.tolist()
        assert 1 <= len(tokens) == len(logprobs) <= 12
    # samples of a prompt differ, and so do the two groups of prompt 3
    assert len({tuple(tokens) for _, _, _, tokens, *_ in responses}) == len(responses)


@pytest.mark.parametrize("case", ["shares", "lockstep"])
def test_two_ranks_know_the_responses_that_one_rank_samples(
    case: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    ranks = on_ranks(tmp_path / "two", case, 2)
    for rank in ranks:
        assert rank["responses"] == alone["responses"]
    passes = [rank["passes"] for rank in ranks]
    assert (passes[0] == passes[1]) is (case == "lockstep")  # the first rank has more to do
    sums = {name: sum(rank["own"][name] for rank in ranks) for name in ("steps", "tokens", "rows")}
    assert [rank["all"] for rank in ranks] == [sums] * 2
    assert sums["tokens"] == sum(len(tokens) for _, _, _, tokens, *_ in alone["responses"])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_expected_decides_who_samples_and_not_what(
    size: int, alone: dict[str, Any], tmp_path: Path
) -> None:
    ranks = on_ranks(tmp_path / "ranks", "balanced", size)
    assert all(rank["responses"] == alone["responses"] for rank in ranks)
    groups, lengths = zip(
        *((group, len(tokens)) for _, group, _, tokens, *_ in alone["responses"]), strict=True
    )
    by_group = np.bincount(groups, lengths)
    shares = shared_out(EXPECTED, size)
    assert [rank["own"]["tokens"] for rank in ranks] == [by_group[share].sum() for share in shares]
    passes = [rank["own"]["steps"] for rank in ranks]
    assert [rank["balance"] for rank in ranks] == [pytest.approx(np.mean(passes) / max(passes))] * size


@pytest.mark.parametrize("case", ["told", "told_lockstep"])
def test_no_rank_gets_responses_when_one_was_told_to_stop(case: str, tmp_path: Path) -> None:
    ranks = on_ranks(tmp_path / "two", case, 2)
    assert [(rank["responses"], rank["error"]) for rank in ranks] == [(None, None)] * 2


@pytest.mark.parametrize("case", ["broken", "broken_lockstep"])
def test_what_goes_wrong_on_one_rank_is_the_error_of_all(case: str, tmp_path: Path) -> None:
    ranks = on_ranks(tmp_path / "two", case, 2)
    assert ranks[0]["error"] == ranks[1]["error"]
    assert ranks[0]["error"].startswith("the policy's logits are not finite after ")


def test_another_key_draws_other_responses() -> None:
    decoder = Decoder(tiny(CONFIGS["llama"]), slots=4)
    params = SamplingParams(1.0, 12, ())
    drawn = []
    for key in ((5, 2), (5, 3), (6, 2), (5, 2)):
        found = roll_out(decoder, prompts(), PROMPT_IDS, params, key=key, samples=1, world=ALONE)
        assert found is not None
        drawn.append(tuple(tuple(response.tokens.tolist()) for response in found))
    assert drawn[0] == drawn[3] and len(set(drawn)) == 3


def test_the_rule_is_what_the_configuration_says() -> None:
    config = RolloutConfig(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=9)
    assert SamplingParams.of(config, [4, 2]) == SamplingParams(0.7, 9, (4, 2), 0.9, 5)
    assert SamplingParams.of(config, [4], greedy=True) == SamplingParams(0.0, 9, (4,))
