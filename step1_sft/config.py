"""What SFT can be told."""

from dataclasses import dataclass, field

from common.config import DataConfig, JobConfig, SamplingConfig
from common.stage import Role, Stage, Step
from common.training_config import OptimConfig, TrainConfig

STAGE = Stage(name=Step.sft, consumes=(), produces=Role.policy, module="step1_sft")
"""SFT consumes nothing but the base model and produces a policy."""
MEASURED = ("loss", "perplexity", "mean_token_accuracy")
"""What every evaluation measures."""


@dataclass
class SFTConfig:
    """The `sft` group."""

    data: DataConfig = field(default_factory=DataConfig)
    """what to train on"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """the loop"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimizer and schedule"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """completions sampled at each evaluation"""

    def measured(self) -> list[str]:
        """Names of what an evaluation can give; `{source}` stands for the name of a source."""
        stop_rate = ["eval/stop_rate"] if self.sampling.num_prompts else []
        return [*(f"eval/{name}" for name in MEASURED), "eval/{source}/loss", *stop_rate]

    def peak_lr(self, *, lora: bool) -> float:
        """The learning rate after warm-up."""
        return self.optim.lr or (2e-4 if lora else 2e-5)


@dataclass
class SFTJob(JobConfig):
    """The part of resolved.yaml that the step's ranks read."""

    sft: SFTConfig = field(default_factory=SFTConfig)
