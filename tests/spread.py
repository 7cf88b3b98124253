"""One training spread in several ways, and what may differ between them: for the tests of numerics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from common.runtime.distributed import World

# fp32 against a float64 reference; the sums have a few hundred terms
GRADIENT_TOLERANCE = 1e-5
# fp32 sums in another order (1e-7), grown by three Adam steps that divide small numbers by small ones
LOSS_TOLERANCE = 1e-5
# before the first update it is only the order of summation
FIRST_TOLERANCE = 1e-6
# the same kernels on the same weights
LOGIT_TOLERANCE = 1e-6
# merged adapters: the products are summed in another order, through all layers
MERGED_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Point:
    """One way to run the same training."""

    ranks: int
    micro_batch_size: int
    packing: bool
    stage: int
    checkpointing: bool = False
    policy: str = "tied"
    lora: bool = False
    sequence_parallel: int = 1
    hpz: int = 1

    @property
    def name(self) -> str:
        words = [f"ranks{self.ranks}", f"micro{self.micro_batch_size}", f"zero{self.stage}", self.policy]
        words.append("packed" if self.packing else "single")
        words += [f"slices{self.sequence_parallel}"] * (self.sequence_parallel > 1)
        words += [f"hpz{self.hpz}"] * (self.hpz > 1)
        return "-".join(words + ["checkpointing"] * self.checkpointing + ["lora"] * self.lora)


SPREAD = [
    Point(1, 1, True, 1),
    Point(1, 4, False, 2),
    Point(1, 2, True, 3, checkpointing=True),
    Point(2, 2, True, 1),
    Point(2, 4, False, 2, checkpointing=True),
    Point(2, 2, True, 2, sequence_parallel=2),
    Point(4, 1, False, 3, sequence_parallel=2),
    Point(2, 1, True, 3),
]
HPZ = [Point(4, 1, True, 3, sequence_parallel=2, hpz=2)]
UNTIED = [Point(1, 8, True, 2, policy="untied"), Point(2, 8, True, 3, policy="untied")]
LORA = [
    Point(1, 8, True, 1, lora=True),
    Point(2, 8, False, 2, lora=True),
    Point(2, 8, True, 3, lora=True),
    Point(2, 8, True, 2, lora=True, sequence_parallel=2),
]


class Sharing(NamedTuple):
    """So many ranks, of which so many share each row."""

    ranks: int
    sequence_parallel: int = 1


SHARING = [Sharing(1), Sharing(2), Sharing(2, 2)]


def sharing(world: World) -> dict[str, int]:
    """The fields of a `BatchPlan` that say which rows and slices are this rank's."""
    return {
        "rank": world.data_rank,
        "world_size": world.data_size,
        "sequence_rank": world.sequence_rank,
        "sequence_parallel": world.sequence_parallel,
    }


def relative_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Norm of the difference of gradients over the norm of what is expected, all parameters together."""
    difference = sum(((found[n].double() - g) ** 2).sum() for n, g in expected.items())
    return float((difference / sum((g**2).sum() for g in expected.values())) ** 0.5)


def assert_plain_logits(run_dir: Path, step: str, *, tolerance: float) -> None:
    """Plain transformers gives the logits that the live model had at the end of the run."""
    from transformers import AutoModelForCausalLM

    live = torch.load(run_dir / "live_logits.pt")
    model = AutoModelForCausalLM.from_pretrained(run_dir / step / "export").eval()
    assert model.dtype is torch.float32
    with torch.no_grad():
        logits = model(live["probe"]).logits[0]
    assert live["probe"].numel() > 10 and logits.abs().max() > 1e-3
    assert float((logits - live["logits"]).abs().max() / logits.abs().max()) <= tolerance
