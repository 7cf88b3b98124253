"""What using a policy reads: how answers are sampled, and the jobs of `generate` and `evaluate`.

The controller checks them as it checks `config.py`, and hands them on as JSON. Nothing here imports torch.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Dict, List, Optional

from common.config import DataConfig, Dtype
from common.fields import as_schema, number
from common.vllm_fit import SamplingEngine, check_vllm_graphs, check_vllm_sampling


@dataclass(frozen=True)
class Settings:
    """How answers are sampled."""

    temperature: float = number(0.7, 0.001, 100, zero="greedy")
    top_p: float = number(1.0, 0, 1, above=True, note="1: all tokens")
    top_k: int = number(0, 0, 10_000_000, note="0: all tokens")
    max_new_tokens: int = number(256, 1, 10_000_000)
    seed: int = number(0, 0, 2**63 - 1)

    def changed(self, name: str, text: str) -> "Settings":
        """With one setting as it was typed. UserError for an unknown name, or a value that it cannot have."""
        return as_schema(Settings, {**dataclasses.asdict(self), name.replace("-", "_"): text})

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


@dataclass(frozen=True)
class ManySettings(Settings):
    """How many prompts are answered."""

    samples: int = number(1, 1, 100_000)
    """completions of each prompt"""
    slots: int = number(64, 1, 1_000_000)
    """completions decoded side by side"""
    dtype: Dtype = Dtype.auto
    """of the weights; auto: bf16 on a GPU, fp32 on a CPU"""
    engine: SamplingEngine = SamplingEngine.builtin
    """what samples: builtin, or vllm in the same environment (make vllm)"""
    cuda_graphs: bool = True
    """on a GPU, decode with CUDA graphs where the model allows it; false if they fail"""

    def check(self, at: str) -> None:
        """The engine can do what it is asked for."""
        if self.engine is SamplingEngine.vllm:
            check_vllm_sampling(self.temperature, self.top_p, self.top_k, at)
            check_vllm_graphs(self.cuda_graphs, at)


@dataclass(frozen=True)
class GenerateJob:
    """What `common.decoding.generate` is told. Its prompts are those of `data`."""

    model: str = ""
    """folder of a policy's artifact"""
    data: DataConfig = field(default_factory=DataConfig)
    """where the prompts are"""
    settings: ManySettings = field(default_factory=ManySettings)
    """how they are answered"""
    out: str = ""
    """file that the completions are appended to"""
    whole_context: bool = True
    """whether a prompt and its completion may fill the model's context, in place of data.max_length"""
    system: Optional[str] = None
    """message of the prompts that have no system message"""


@dataclass(frozen=True)
class EvaluationSettings(ManySettings):
    """How prompts are answered that are evaluated on: greedily, unless a temperature is named."""

    temperature: float = number(0.0, 0.001, 100, zero="greedy")


@dataclass(frozen=True)
class EvaluateJob:
    """What `evaluation` is told."""

    model: str = ""
    """folder of the artifact that is evaluated"""
    against: Optional[str] = None
    """folder of another, measured on the same rows"""
    data: DataConfig = field(default_factory=DataConfig)
    """where the rows are"""
    functions: List[str] = field(default_factory=list)
    """package.module:function that score completions"""
    reward_model: Optional[str] = None
    """folder of a reward model that scores completions"""
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    """how prompts are answered"""
    out: Optional[str] = None
    """file that gets the numbers, in all and by row"""
    whole_context: bool = True
    """as in GenerateJob"""
    names: Dict[str, str] = field(default_factory=dict)
    """what the user typed for model, against and reward_model"""
