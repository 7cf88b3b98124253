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


class Input(Enum):
    """An artifact that a step takes, by the key that names it: `dpo.reference`."""

    policy = "policy"
    reward_model = "reward_model"
    reference = "reference"

    @property
    def role(self) -> Role:
        """What the artifact must be."""
        return Role.reward_model if self is Input.reward_model else Role.policy

    @property
    def is_named(self) -> bool:
        """Whether only the user gives it: no earlier step's artifact takes its place."""
        return self is Input.reference


@dataclass(frozen=True)
class Stage:
    """One step of a run, as the controller sees it."""

    name: Step
    consumes: tuple[Input, ...]
    produces: Role
    module: str  # `python -m <module>` under torchrun's environment contract
