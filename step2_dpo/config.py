"""What DPO can be told."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from common.config import DataConfig, JobConfig, OptimConfig, SamplingConfig, TrainConfig
from common.errors import UserError
from common.fields import require
from common.stage import Role, Stage, Step

STAGE = Stage(name=Step.dpo, consumes=(Role.policy,), produces=Role.policy, module="step2_dpo")
"""DPO starts from a policy, which is its reference too, and produces a policy."""


class LossType(Enum):
    sigmoid = "sigmoid"
    ipo = "ipo"
    hinge = "hinge"


@dataclass
class DPOConfig:
    """The `dpo` group."""

    policy: Optional[str] = None
    """folder of the policy artifact to start from; by default what an earlier step of this run made"""
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
    beta: float = 0.1
    """how strongly the policy is held to the reference; smaller lets it move further"""
    label_smoothing: float = 0.0
    """share of the pairs taken to be labelled the wrong way round (cDPO; sigmoid only)"""
    length_normalized: bool = False
    """log-probabilities per token instead of per answer; ipo always does this"""
    sft_weight: float = 0.0
    """weight of the chosen answers' negative log-likelihood per token"""

    def __post_init__(self) -> None:
        require(0 < self.beta < float("inf"), "dpo.beta", self.beta, "a number above 0")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "dpo.label_smoothing", smoothing, "0 up to (not including) 0.5")
        require(0 <= self.sft_weight < float("inf"), "dpo.sft_weight", self.sft_weight, "0 or more")
        if smoothing > 0 and self.loss_type is not LossType.sigmoid:
            raise UserError(
                f"dpo.label_smoothing={smoothing} has no effect with dpo.loss_type={self.loss_type.value}",
                hint="dpo.loss_type=sigmoid, or dpo.label_smoothing=0",
            )

    def peak_lr(self, *, lora: bool) -> float:
        """The learning rate after warm-up."""
        return self.optim.lr or (5e-6 if lora else 5e-7)


@dataclass
class DPOJob(JobConfig):
    """The part of resolved.yaml that the step's ranks read."""

    dpo: DPOConfig = field(default_factory=DPOConfig)
