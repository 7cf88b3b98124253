"""One rank of a roll-out: writes what it got to FOLDER/rank_R.json.

CASE: shares, balanced (by expected lengths), lockstep (ranks with unequal work keep step), told (the last
rank alone is told to stop),
told_lockstep (both), broken and broken_lockstep (the logits of the last rank alone are not finite).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.data.types import TokenizedPrompt
from common.decoding.decoder import Decoder
from common.decoding.requests import SamplingParams
from common.errors import UserError
from common.runtime.distributed import all_reduce_sum, close_world, init_world
from step3_ppo.rollout import balance, over_ranks, roll_out
from tests.common.model.test_attention import CONFIGS, tiny

PROMPT_IDS = [3, 0, 4, 1, 3]  # one twice; with two ranks one has three groups and the other two

EXPECTED = np.array([7.0, np.nan, 2.0, 30.0, 7.0])


def prompts() -> list[TokenizedPrompt]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 64, 4 + 3 * number).astype(np.int32) for number in range(5)]
    return [TokenizedPrompt(part, "", {}, "") for part in ids]


def main(folder: str, case: str) -> int:
    world = init_world()
    model = tiny(CONFIGS["llama"])
    passes = [0]

    def count(*_: object) -> None:
        passes[0] += 1
        if "lockstep" in case:  # as under ZeRO-3, a pass that a rank makes alone would never end
            assert all_reduce_sum([1.0]) == [world.size]

    model.register_forward_pre_hook(count)
    decoder = Decoder(model, slots=2)
    is_last = world.rank == world.size - 1
    if case.startswith("broken") and is_last:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    before, found, error = passes[0], None, None
    try:
        found = roll_out(
            decoder,
            prompts(),
            PROMPT_IDS,
            SamplingParams(1.0, 12, (1, 2, 3, 4)),
            key=(5, 2),
            samples=3,
            expected=EXPECTED if case == "balanced" else None,
            world=world,
            should_stop=lambda: case.startswith("told") and is_last,
            lockstep="lockstep" in case,
        )
    except UserError as caught:
        error = str(caught)
    responses = None if found is None else [
        [r.prompt_id, r.group, r.prompt.tolist(), r.tokens.tolist(), r.logprobs.tolist(), r.stopped]
        for r in found
    ]  # fmt: skip
    result = {"responses": responses, "error": error, "passes": passes[0] - before}
    if found is not None:
        result |= {"own": asdict(decoder.counts), "all": asdict(over_ranks(decoder.counts))}
        result["balance"] = balance(decoder.counts, world)
    (Path(folder) / f"rank_{world.rank}.json").write_text(json.dumps(result))
    close_world()
    return 0
