"""What an architecture makes a step do in another way than one would expect, said before the step starts.

Takes a `ModelConfig`; makes a small network of its architecture from the config alone and takes it the way
that a step's network goes: what falls back on it says so in a notice, as it does in the step. Reads no
weights. Where no small network can be made, a notice says that nothing was asked.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from common.config import Dtype, ModelConfig
from common.decoding.decoder import Decoder
from common.model import attention
from common.model.architecture import CAUSAL_LM, HeadSpec, attention_for, read_config, say_what_differs
from common.model.loading import make_network
from common.model.miniature import reduced, small_network
from common.model.packed import PackedCausalLM
from common.model.probes import check_packed
from common.model.scalar_head import NEW_REWARD_MODEL, PackedScalarModel, begin
from common.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def foresee_policy(model: ModelConfig, *, samples: bool) -> None:
    """Notices of a causal LM, sampled from if `samples`. UserError for one that the step would refuse."""
    network = _small(model, CAUSAL_LM)
    if network is not None:
        check_packed(network)
        PackedCausalLM(network)
        if samples:
            Decoder(network, slots=1)


def foresee_scalar(model: ModelConfig) -> None:
    """Notices of a reward model or value network with this decoder. UserError as in `foresee_policy`."""
    network = _small(model, NEW_REWARD_MODEL)
    if network is not None:
        begin(network, seed=0)
        PackedScalarModel(network)


def _small(model: ModelConfig, head: HeadSpec) -> PreTrainedModel | None:
    config = read_config(model)
    attention.register()
    attention_for(config, head)
    say_what_differs(config, model)
    config.update(dict(head.fields))
    in_fp32 = dataclasses.replace(model, dtype=Dtype.fp32)
    network = small_network(config, lambda small: make_network(small, in_fp32, head))
    if network is None:
        make_network(reduced(config), in_fp32, head)  # refused, as it is when a step rehearses its export
        notice(
            "what the architecture falls back to is not known before the run",
            f"a small network of model_type={config.model_type} does not run",
        )
    return network
