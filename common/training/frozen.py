"""A network that is never trained: PPO's reference and reward model, DPO's reference.

Takes a module with its weights, or an artifact; holds it without gradients, dropout and optimizer. On ZeRO
stages 1 and 2 it is whole on every rank, and can wait in host memory between its phases. On stage 3 it is
partitioned over the ranks like the trained networks, so that a large one fits. Does not decide when it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from common.artifacts import Artifact
from common.config import (
    CheckpointingPolicy,
    DeepSpeedConfig,
    Dtype,
    JobConfig,
    LoraConfig,
    ModelConfig,
    Offload,
    Quantize,
)
from common.handoff import model_of
from common.model.loading import load_model
from common.model.packed import PackedCausalLM, refuse_unsliced
from common.model.partition import node_reading, share_of
from common.model.probes import find_shortcuts
from common.runtime.distributed import World
from common.training.ds_config import build_frozen_config
from common.training.engine import Partitioned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Frozen:
    """A frozen module. Called, it does what the module does, without gradients.

    On stage 3 every call is a collective: all ranks make the same number of them.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        deepspeed: DeepSpeedConfig,
        *,
        dtype: Dtype,
        world: World,
        offload: bool = False,
    ) -> None:
        """offload: keep the weights in host memory outside of `present()`; on stage 3, where a layer's
        weights are whole only while it runs, keep this rank's part there for good.
        """
        self.module = module.requires_grad_(False).eval()
        self._partitioned: Partitioned | None = None
        self._host: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._device, self._users = world.device, 0
        if deepspeed.stage == 3:
            where = Offload.cpu if offload else deepspeed.offload_param
            config = build_frozen_config(
                dataclasses.replace(deepspeed, offload_param=where),
                dtype=dtype,
                world_size=world.size,
                num_parameters=sum(parameter.numel() for parameter in module.parameters()),
            )
            self._partitioned = Partitioned(module, config)
        elif offload:
            for parameter in module.parameters():
                host = parameter.data.to("cpu")
                self._host.append((parameter, host.pin_memory() if parameter.is_cuda else host))
            self._put_away()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._host and not self._users:
            raise ValueError("a model that lies in host memory is asked inside of present()")
        if self._partitioned is not None:
            return self._partitioned(*args, **kwargs)
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @contextmanager
    def present(self) -> Iterator[None]:
        """The weights are on the device while the block runs; around several calls, they travel once."""
        if self._host and not self._users:
            for parameter, host in self._host:
                # a copy also where host and device are one, so that both behave alike
                parameter.data = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._put_away()

    def _put_away(self) -> None:
        """Drop the device's copy; nothing is copied back, because the weights never change."""
        for parameter, host in self._host:
            parameter.data = host


def load_frozen_policy(
    job: JobConfig,
    policy: Artifact,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    offload: bool = False,
) -> Frozen:
    """The policy in `job.model.dtype`, without adapters and not quantized: a frozen `PackedCausalLM`."""
    settings, share = frozen_settings(model_of(job.model, policy.path)), share_of(job.deepspeed.stage)
    node = node_reading(job.launch)
    network = load_model(settings, tokenizer, seed=job.seed, device=world.device, share=share, node=node)
    refuse_unsliced(network, job.launch, world.size)
    module = PackedCausalLM(network, find_shortcuts(network))
    return Frozen(module, job.deepspeed, dtype=job.model.dtype, world=world, offload=offload)


def frozen_settings(model: ModelConfig) -> ModelConfig:
    """How a network is loaded that is not trained."""
    return dataclasses.replace(
        model, lora=LoraConfig(enabled=False), quantize=Quantize.none, gradient_checkpointing=False,
        checkpointing_policy=CheckpointingPolicy.full, tiled_mlp=None, activation_offload=False,
    )  # fmt: skip
