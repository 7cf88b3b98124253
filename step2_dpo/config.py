"""What DPO can be told."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from common.config import DataConfig, JobConfig, SamplingConfig
from common.errors import UserError
from common.fields import number
from common.stage import Input, Role, Stage, Step
from common.training_config import OptimConfig, TrainConfig

STAGE = Stage(
    name=Step.dpo, consumes=(Input.policy, Input.reference), produces=Role.policy, module="step2_dpo"
)
"""DPO starts from a policy, which is its reference unless another is named, and produces a policy."""
MEASURED = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "entropy", "mean_token_accuracy",
)  # fmt: skip
"""What every evaluation measures, and every training step, which may leave the entropy out."""


class LossType(Enum):
    sigmoid = "sigmoid"
    ipo = "ipo"
    hinge = "hinge"


@dataclass
class DPOConfig:
    """The `dpo` group."""

    policy: Optional[str] = None
    """artifact, run, model's folder or ORG/NAME@REVISION to start from; by default the run's own"""
    reference: Optional[str] = None
    """artifact, run, model's folder or ORG/NAME@REVISION that is the reference; by default the policy"""
    data: DataConfig = field(default_factory=DataConfig)
    """pairs of answers to train on; max_length is that of one answer with its prompt"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """the loop; global_batch_size counts pairs"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimizer and schedule"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """completions sampled at each evaluation"""
    loss_type: LossType = LossType.sigmoid
    """sigmoid (with label_smoothing: cDPO), ipo or hinge"""
    beta: float = number(0.1, 0, 1_000, above=True)
    """how strongly the policy is held to the reference; smaller lets it move further"""
    label_smoothing: float = number(0.0, 0, 0.5, below=True)
    """share of the pairs taken to be labelled the wrong way round (cDPO; sigmoid only)"""
    length_normalized: bool = False
    """log-probabilities per token instead of per answer; ipo always does this"""
    sft_weight: float = number(0.0, 0, 1_000)
    """weight of the chosen answers' negative log-likelihood per token"""

    def check(self, at: str) -> None:
        """Only the sigmoid loss smooths labels."""
        smoothing = self.label_smoothing
        if smoothing > 0 and self.loss_type is not LossType.sigmoid:
            raise UserError(
                f"{at}label_smoothing={smoothing} has no effect with {at}loss_type={self.loss_type.value}",
                hint=f"{at}loss_type=sigmoid, or {at}label_smoothing=0",
            )

    def measured(self) -> list[str]:
        """Names of what an evaluation can give."""
        stop_rate = ["eval/stop_rate"] if self.sampling.num_prompts else []
        return [*(f"eval/{name}" for name in MEASURED), *stop_rate]

    def peak_lr(self, *, lora: bool) -> float:
        """The learning rate after warm-up."""
        return self.optim.lr or (5e-6 if lora else 5e-7)


@dataclass
class DPOJob(JobConfig):
    """The part of resolved.yaml that the step's ranks read."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
