"""Where the host waits for the device in an optimizer step, and why; what is not in the table is a fault.

Counted in a run's last step: DeepSpeed does more in its first. Lines are left out, functions are not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from common.config import Dtype
from tests.gpu_fake.jobs import MICRO_BATCHES, STEPS, TRAINING, Outcome, Shape, without_lines

STEP = "<- common/training/engine.py step"
BACKWARD = "<- common/training/engine.py backward"
UTILS, ZERO = "deepspeed/runtime/utils.py", "deepspeed/runtime/zero"
SYNCHRONIZE = "synchronize: deepspeed/accelerator/cuda_accelerator.py synchronize"


@dataclass(frozen=True)
class Wait:
    """of_network: once for each network that learns. per_micro_batch: else per optimizer step."""

    where: str
    why: str
    count: int = 1
    of_network: bool = True
    per_micro_batch: bool = False


OURS = (
    Wait("item: common/training/engine.py step", "the gradient norm, for the log"),
    Wait("tolist: common/runtime/distributed.py on_host", "the step's sums, for the log", of_network=False),
)
OF_REWARD = (
    OURS[0],
    Wait("copy to host: step2_reward/loss.py joined", "the step's scores, for the log", of_network=False),
)
SKIPPED = "whether the step is skipped"
STAGE_1 = (
    Wait(f"item: {UTILS} is_invalid_grad_norm {STEP}", SKIPPED),
    Wait(f"item: {UTILS} clip_tensors_by_global_norm {STEP}", "whether there is something to clip"),
)
WITH_SCALE = (
    Wait(f"item: {ZERO}/stage_1_and_2.py has_overflow {STEP}", SKIPPED),
    Wait(f"item: {UTILS} is_invalid_grad_norm {STEP}", f"{SKIPPED}; asked twice", count=2),
)
IN_FP32 = WITH_SCALE[1:]
STAGE_2 = (
    *WITH_SCALE,
    Wait(f"{SYNCHRONIZE} {BACKWARD}", "gradients go to the stream that reduces them", per_micro_batch=True),
)
STAGE_3 = (
    Wait(f"item: {UTILS} is_invalid_grad_norm {STEP}", SKIPPED),
    Wait(
        f"stream.synchronize: {ZERO}/stage3.py independent_gradient_partition_epilogue {BACKWARD}",
        "the stream that reduces gradients has to be done",
        per_micro_batch=True,
    ),
)
GATHERED = "small weights that stay whole are gathered again"
ALONE = (Wait(f"stream.synchronize: {ZERO}/partition_parameters.py wait {STEP}", GATHERED),)
SEVERAL = (Wait(f"{SYNCHRONIZE} {STEP}", GATHERED),)
WEIGHTS = 20
"""Of the tiny model."""
HPZ = Wait(
    f"stream.synchronize: {ZERO}/partition_parameters.py _partition_param_sec {STEP}",
    "each weight's copy within the node is made anew",
    count=WEIGHTS,
)
SAMPLING = {"copy to host: common/decoding/scheduler.py _on_host": "the tokens that were drawn"}
"""Once per pass of the decoder, whether it takes in prompts or not."""
RECORDING = "synchronize: common/decoding/graphs.py recorded"
"""Once per roll-out and number of rows, where passes without prompts are repeated often enough."""
SCORING = {"copy to host: step3_ppo/minibatches.py computed": "what a network says of a micro-batch"}


def waits_of(step: str, shape: Shape) -> tuple[Wait, ...]:
    """What a step of this shape may wait for."""
    ours = OF_REWARD if step == "reward" else OURS
    if shape.stage == 3:
        gathered = (HPZ,) if shape.hpz > 1 else ()
        return (*ours, *STAGE_3, *(ALONE if shape.size == 1 else SEVERAL), *gathered)
    if shape.stage == 2:
        return (*ours, *STAGE_2)
    return (*ours, *{Dtype.bf16: STAGE_1, Dtype.fp16: WITH_SCALE, Dtype.fp32: IN_FP32}[shape.dtype])


def expected(step: str, shape: Shape, micro_batches: int = MICRO_BATCHES) -> Counter[str]:
    """How often each wait of the table comes in an optimizer step."""
    networks = 2 if step == "ppo" else 1
    return Counter(
        {
            wait.where: wait.count
            * (networks if wait.of_network else 1)
            * (micro_batches if wait.per_micro_batch else 1)
            for wait in waits_of(step, shape)
        }
    )


def assert_waits(outcome: Outcome, wanted: Counter[str], phases: tuple[str, ...] = TRAINING) -> None:
    """The last step waits as often as the table says, for what it says; else the lines are shown."""
    found = outcome.syncs_of(STEPS, phases)
    different = {where for where in found | wanted if found[where] != wanted[where]}
    lines = [
        f"{what} at {site}: {count} times"
        for phase, step, what, site, count in outcome.syncs
        if step == STEPS and phase in phases and f"{what}: {without_lines(site)}" in different
    ]
    assert not different, "the host waits for the device:\n" + "\n".join(
        [*lines, *(f"{where}: {found[where]} instead of {wanted[where]}" for where in sorted(different))]
    )
