"""The calibration of a published reward model, from a first batch of the policy's responses.

The reward step calibrates its own models on held-out pairs; a published one names neither mean nor standard
deviation of its scores. Takes the networks before anything is trained; leaves `calibration.json` in
the step's folder, which a resumed run reads again, so that its rewards stay in the same units.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.artifacts import Artifact, read_json, write_json
from common.data.stored import PromptDataset
from common.files import disk_errors
from common.phases import enter
from common.runtime.distributed import World, broadcast_from_rank0
from step3_ppo.config import CALIBRATION
from step3_ppo.networks import Networks
from step3_ppo.rewards.sources import Calibration
from step3_ppo.rollout import Experience, Sampler
from step3_ppo.scoring import Scoring

STREAM = 0x63616C
"""Sets these draws apart from those of iterations."""
log = logging.getLogger("rlhf.ppo")


def calibrate(
    scoring: Scoring,
    reward_model: Artifact,
    sampler: Sampler,
    rows: PromptDataset,
    prompt_ids: Sequence[int],
    networks: Networks,
    folder: Path,
    world: World,
    *,
    seed: int,
    samples: int,
    say: Callable[[str], None],
) -> None:
    """Give `scoring` the mean and standard deviation of the reward model's scores on these prompts.

    samples: responses to each. folder: the step's. UserError where all scores are the same.
    """
    key = {"reward_model": reward_model.sha256, "seed": seed, "prompts": len(prompt_ids), "samples": samples}
    found = broadcast_from_rank0(world, lambda: _kept(folder / CALIBRATION, key))
    if found is None:
        enter("rollout")
        responses = sampler(rows, prompt_ids, key=(seed, STREAM), samples=samples, to_the_end=True)
        assert responses is not None
        scores = scoring.by_model(Experience(responses), scoring.texts(responses, rows), networks)
        assert scores is not None
        found = {**key, "mean": float(scores.mean()), "std": float(scores.std())}
        broadcast_from_rank0(world, lambda: _keep(folder / CALIBRATION, found))
    scoring.calibration = Calibration.of({"calibration": found}, reward_model.path)
    say(
        f"reward model: mean {found['mean']:.4g} and standard deviation {found['std']:.4g} over "
        f"{len(prompt_ids) * samples} responses of the policy, from which rewards count"
    )


def _keep(path: Path, measured: Mapping[str, Any]) -> None:
    with disk_errors(path):
        write_json(path, measured)


def _kept(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The calibration that an earlier process of this run saved; None without a whole file."""
    try:
        found = read_json(path)
        return found if isinstance(found, dict) and key.items() <= found.items() else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): it is measured again", path, error)
        return None
