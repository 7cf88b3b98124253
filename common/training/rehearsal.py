"""An export tried before anything is trained: a fault of the export is found at the start, not at the end.

Takes a `ModelConfig`; makes a small copy of its architecture (few layers, small matrices, the same type, ties
and experts) with random weights, puts the same adapters around it, and exports and reads it back as a
finished run does. Reads the model's config, never its weights. A model that does not come back is a
UserError; where no small copy can be made, a notice says so and nothing is refused.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.config import Dtype, ModelConfig
from common.errors import UserError
from common.model import attention
from common.model.adapters import add_adapters
from common.model.architecture import HeadSpec, read_config
from common.model.hub import told
from common.model.loading import make_network
from common.model.miniature import reduced
from common.training.export import try_export

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def rehearse_export(model: ModelConfig, head: HeadSpec, say: Callable[[str], None]) -> None:
    """Export a small copy of `model`, untrained. UserError when it does not come back as it was.

    Leaves random states as they were. Costs a second or so, whatever the model's size.
    """
    config = read_config(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            network = _small(config, model, head)
        except UserError:
            raise
        except Exception as error:  # whatever a config that was made for other sizes leads to
            kind = f"model_type={config.model_type}"
            say(f"note: the export of {kind} was not tried beforehand: {told(error)}")
            return
        if model.lora.enabled:
            network = add_adapters(network, model.lora, head.task_type)
        _move_weights(network)
        with tempfile.TemporaryDirectory(prefix="rehearsal_") as folder:
            try:
                fault = try_export(network, Path(folder))
            except Exception as error:  # peft and transformers raise what they like
                fault = told(error)
    if fault is None:
        return
    adapted = f" with adapters on {list(model.lora.targets)}" if model.lora.enabled else ""
    raise UserError(
        f"model_type={config.model_type}{adapted} could be trained, but not be exported: {fault}",
        hint="use model.lora.targets=[q_proj,k_proj,v_proj,o_proj]" if adapted else "use another model",
    )


def _small(config: PreTrainedConfig, model: ModelConfig, head: HeadSpec) -> PreTrainedModel:
    """A network of the config's type that computes something, in fp32, with weights of its own."""
    attention.register()
    small = reduced(config)
    small.update({**head.fields, "pad_token_id": 0})
    network = make_network(small, dataclasses.replace(model, dtype=Dtype.fp32), head)
    with torch.no_grad(), attention.plain_attention(network):
        network.eval()(torch.arange(3, 9)[None], use_cache=False)
    return network


@torch.no_grad()
def _move_weights(network: torch.nn.Module) -> None:
    """Add noise to the trained weights: adapters begin as zero, and merging zero shows nothing."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn_like(parameter))
