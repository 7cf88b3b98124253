"""What using a policy reads: how answers are sampled, and the jobs of `generate` and `evaluate`.

The controller checks them as it checks `config.py`, and hands them on as JSON. Nothing here imports torch.
"""

import dataclasses
from dataclasses import dataclass, field

from common.config import DataConfig, Dtype
from common.fields import as_schema, number


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
