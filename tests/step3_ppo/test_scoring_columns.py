"""Which of the rows' columns functions that score are offered, whatever source a row is from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from common.data.types import TokenizedPrompt
from common.errors import UserError
from common.runtime.distributed import World
from step3_ppo.config import PPOConfig, RewardSourceConfig
from step3_ppo.rollout import Response
from step3_ppo.scoring import Scoring

WORLD = World(0, 1, 0, torch.device("cpu"))
NO_TOKENS = np.zeros(0, np.int32)
NAMES = RewardSourceConfig(function="tests.step3_ppo.reward_functions:right")
"""A function that wants the column answer."""


class Rows:
    """A data set of some sources, each with rows of the same columns."""

    def __init__(self, *sources: list[dict[str, Any]]) -> None:
        self._columns = [columns for source in sources for columns in source]
        self.source_ids = np.repeat(np.arange(len(sources)), [len(source) for source in sources])

    def __getitem__(self, index: int) -> TokenizedPrompt:
        return TokenizedPrompt(NO_TOKENS, "a prompt", self._columns[index], "")


class Tokenizer:
    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def scoring(*rewards: RewardSourceConfig) -> Scoring:
    return Scoring(PPOConfig(rewards=list(rewards)), None, Tokenizer(), WORLD)  # type: ignore[arg-type]


def responses_to(*prompt_ids: int) -> list[Response]:
    tokens = np.array([7, 2], np.int32)
    return [Response(i, i, NO_TOKENS, tokens, np.zeros(2, np.float32), True) for i in prompt_ids]


ANSWERED, PLAIN = {"answer": "4"}, {"level": 1}


@pytest.mark.parametrize("rows", [Rows([ANSWERED], [PLAIN]), Rows([PLAIN, PLAIN], [ANSWERED])])
def test_a_column_that_one_source_has_is_offered_with_every_batch(rows: Any) -> None:
    asked = scoring(NAMES)
    asked.check(rows)
    plain = [index for index in range(2) if "answer" not in rows[index].columns]
    texts = asked.texts(responses_to(*plain), rows)
    assert texts.columns == {"answer": [None] * len(plain), "level": [1] * len(plain)}
    assert texts.completions == ["7"] * len(plain)  # the terminator is left out


def test_a_column_that_no_source_has_is_missed_at_once() -> None:
    rows: Any = Rows([PLAIN], [{"source": "b"}])
    with pytest.raises(UserError, match="takes answer") as caught:
        scoring(NAMES).check(rows)
    assert "the rows have the columns level, source" in str(caught.value)
    assert "held out" not in str(caught.value)


def test_a_column_that_only_the_held_out_rows_lack_is_said_to_be_missed_there() -> None:
    held_out: Any = Rows([PLAIN])
    asked = scoring(NAMES)
    asked.check(Rows([ANSWERED]))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="takes answer.* nor a column of the rows that are held out"):
        asked.check(held_out, held_out=True)


def test_a_column_that_the_first_row_lacks_is_still_one_of_its_sources() -> None:
    rows: Any = Rows([PLAIN, ANSWERED, PLAIN])
    asked = scoring(NAMES)
    asked.check(rows)
    assert asked.texts(responses_to(0, 1), rows).columns == {"answer": [None, "4"], "level": [1, None]}
