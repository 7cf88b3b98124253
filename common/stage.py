"""What a step takes and gives: stages meet only on disk, through artifacts with a role."""

from dataclasses import dataclass
from enum import Enum


class Step(Enum):
    """The steps a run can be made of, in the order in which they may follow each other."""

    sft = "sft"
    reward = "reward"
    dpo = "dpo"
    ppo = "ppo"


class Role(Enum):
    """What an artifact is for."""

    policy = "policy"
    reward_model = "reward_model"


@dataclass(frozen=True)
class Stage:
    """One step of a run, as the controller sees it."""

    name: Step
    consumes: tuple[Role, ...]
    produces: Role
    module: str  # `python -m <module>` under torchrun's environment contract
