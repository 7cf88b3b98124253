"""What SFT can be told, and the checks that need more than one group."""

from dataclasses import dataclass, field

from common.config import (
    DataConfig,
    DeepSpeedConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    TrackingConfig,
    TrainConfig,
)


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
class SFTJob:
    """The part of resolved.yaml that the step's ranks read."""

    run_name: str = ""
    output_dir: str = "runs"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
