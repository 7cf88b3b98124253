"""Schema of a step's `train` and `optim`: the loop, its optimizer and its schedule."""

from dataclasses import dataclass, field
from enum import Enum
from typing import List, Optional

from common.fields import number, require


class OptimizerName(Enum):
    adamw = "adamw"
    adamw_bf16 = "adamw_bf16"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"
    adafactor = "adafactor"
    muon = "muon"


class SchedulerName(Enum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    inverse_sqrt = "inverse_sqrt"
    wsd = "wsd"


class Exported(Enum):
    best = "best"
    last = "last"


@dataclass
class StopWhenConfig:
    """Early stopping."""

    metric: Optional[str] = None
    """of the evaluations, e.g. eval/loss; the step ends when it is no longer better. null: off"""
    patience: int = number(3, 1, 1_000_000)
    """evaluations in a row without a better one"""


@dataclass
class TrainConfig:
    """The loop."""

    global_batch_size: int = number(128, 1, 1_000_000)
    """rows per optimizer step, over all ranks (packed rows when packing)"""
    micro_batch_size: int = number(1, 1, 1_000_000)
    """rows per rank and forward pass; accumulation follows from the three numbers"""
    epochs: float = number(1.0, 0, 10_000, above=True)
    """passes over the data"""
    max_steps: Optional[int] = number(None, 1, 10**9)
    """optimizer steps; takes the place of epochs"""
    eval_every: int = number(0, 0, 10**9)
    """steps between evaluations; 0: only at the end"""
    save_every: int = number(0, 0, 10**9)
    """steps between checkpoints; 0: only at the end, when told to stop, and by save_minutes"""
    save_minutes: float = number(30.0, 0, 1_000_000)
    """and one after so many minutes without; 0: never"""
    entropy_every: int = number(1, 0, 10**9)
    """steps between those that log the entropy of the predicted tokens; 0: never (not in reward)"""
    async_save: Optional[bool] = None
    """write checkpoints from host memory while training goes on; null: on a GPU"""
    keep_checkpoints: int = number(2, 1, 1_000_000)
    """newest checkpoints kept, beside the best one"""
    export: Exported = Exported.last
    """the weights that the step exports: of its last step, or best on held-out rows (not in ppo)"""

    stop_when: StopWhenConfig = field(default_factory=StopWhenConfig)
    """early stopping"""

    def saves_beside(self, *, gpu: bool) -> bool:
        """Whether training goes on while a checkpoint is written."""
        return gpu if self.async_save is None else self.async_save


@dataclass
class OptimConfig:
    """Optimizer and schedule."""

    name: OptimizerName = OptimizerName.adamw
    """adamw is torch's fused one, adamw_bf16 keeps its moments in bf16, rounded stochastically"""
    lr: Optional[float] = number(None, 0, 10, above=True, note="Muon takes larger ones than AdamW")
    """peak learning rate; by default SFT 2e-5, reward model 1e-5, DPO 5e-7, with LoRA ten times that"""
    betas: List[float] = number([0.9, 0.95], 0, 1, below=True)
    """AdamW's decay rates"""
    eps: float = number(1e-8, 0, 1, above=True)
    """AdamW's epsilon"""
    weight_decay: float = number(0.0, 0, 10)
    """never applied to biases and norms"""
    scheduler: SchedulerName = SchedulerName.cosine
    """shape after warm-up"""
    warmup_ratio: float = number(0.03, 0, 1)
    """share of the steps with rising learning rate"""
    warmup_steps: Optional[int] = number(None, 0, 10**9)
    """steps with rising learning rate; takes the place of warmup_ratio"""
    min_lr_ratio: float = number(0.1, 0, 1)
    """floor of cosine and wsd, as a share of the peak"""
    max_grad_norm: float = number(1.0, 0, 1_000_000)
    """clip the global gradient norm; 0: off"""

    def check(self, at: str) -> None:
        """AdamW has two rates."""
        require(len(self.betas) == 2, f"{at}betas", self.betas, "two numbers")
