"""What the reward model's training can be told."""

from dataclasses import dataclass, field
from typing import Optional

from common.config import DataConfig, JobConfig
from common.errors import UserError
from common.fields import number
from common.stage import Input, Role, Stage, Step
from common.training_config import OptimConfig, TrainConfig

STAGE = Stage(name=Step.reward, consumes=(Input.policy,), produces=Role.reward_model, module="step2_reward")
"""The reward model starts from a policy and produces a reward model."""
MEASURED = (
    "loss", "accuracy", "margin", "mean_reward", "std_reward", "expected_calibration_error",
    "reward_length_correlation",
)  # fmt: skip
"""What every evaluation measures."""
BY_LENGTH = ("accuracy_chosen_longer", "accuracy_chosen_shorter", "accuracy_same_length")
"""What is measured where there are such pairs."""


@dataclass
class RewardConfig:
    """The `reward` group."""

    policy: Optional[str] = None
    """artifact, run, model's folder or ORG/NAME@REVISION to start from; by default the run's own"""
    data: DataConfig = field(default_factory=DataConfig)
    """pairs of answers to train on; max_length is that of one answer with its prompt"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """the loop; global_batch_size counts pairs"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimizer and schedule"""
    center_rewards_coefficient: float = number(0.0, 0, 1_000)
    """weight of the mean squared sum of a pair's rewards, which draws rewards towards 0 (0.01 is usual)"""
    warn_below_accuracy: float = number(0.6, 0, 1)
    """say so when fewer held-out pairs than this share are ordered as people ordered them"""

    def check(self, at: str) -> None:
        """A reward model predicts no tokens."""
        if self.train.entropy_every != TrainConfig.entropy_every:
            raise UserError(
                f"{at}train.entropy_every={self.train.entropy_every} has no effect: a reward model predicts "
                "no tokens, so that there is no entropy",
                hint="leave it out",
            )

    def measured(self) -> list[str]:
        """Names of what an evaluation can give; `{source}` stands for the name of a source."""
        return [*(f"eval/{name}" for name in (*MEASURED, *BY_LENGTH)), "eval/{source}/accuracy"]

    def peak_lr(self, *, lora: bool) -> float:
        """The learning rate after warm-up."""
        return self.optim.lr or (1e-4 if lora else 1e-5)


@dataclass
class RewardJob(JobConfig):
    """The part of resolved.yaml that the step's ranks read."""

    reward: RewardConfig = field(default_factory=RewardConfig)
