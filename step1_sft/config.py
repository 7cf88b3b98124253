"""What SFT can be told, and the checks that need more than one group."""

from dataclasses import dataclass, field

from common.config import DataConfig, JobConfig, OptimConfig, SamplingConfig, TrainConfig


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


@dataclass
class SFTJob(JobConfig):
    """The part of resolved.yaml that the step's ranks read."""

    sft: SFTConfig = field(default_factory=SFTConfig)
