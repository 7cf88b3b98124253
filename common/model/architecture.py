"""What an architecture can do here, by its config and its class alone: nothing is made and nothing is run.

Takes a `ModelConfig` or a config of transformers; returns configs, the attention to load with, and why
documents cannot be packed. What is no decoder of text is refused by name; a notice says what is not computed,
or computed in a slower way. What only a forward pass can tell is found in `probes.py`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import ModelConfig
from common.errors import UserError
from common.model import attention
from common.model.hub import check_folder, loading_errors, locate
from common.model.last_layer import WHOLE_LAYER
from common.notices import notice
from common.text import did_you_mean, told

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKED_LAYERS = {"full_attention", "sliding_attention", "attention", "mlp", "moe", "dense", "sparse"}
"""Types of layers, as configs name them, in which nothing but attention joins tokens."""

ROUTER_LOSSES = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "router_z_loss_coef")
"""Fields by which configs weigh a loss of their routers."""

ASKS_FOR_DECODER = r"(=|if|not) (self\.)?config\.is_decoder"


def _as_it_is(network: PreTrainedModel, model: ModelConfig, seed: int) -> None:
    """Nothing is to be done."""


@dataclass(frozen=True)
class HeadSpec:
    """What a network has above its decoder, and what follows from that when it is loaded."""

    name: str  # for error messages
    auto_class: str  # of transformers
    task_type: str  # of peft
    fields: Mapping[str, Any] = field(default_factory=dict)  # that the config must have
    made_new: tuple[str, ...] = ()  # tensors that the weights may lack
    left_out: tuple[str, ...] | None = None  # the only ones they may have besides; None: any, with a warning
    settle: Callable[[PreTrainedModel, ModelConfig, int], None] = _as_it_is
    """Completes the head of a network that was loaded or made, by a seed; UserError for a wrong one."""

    @property
    def transformers_class(self) -> Any:
        import transformers

        return getattr(transformers, self.auto_class)


CAUSAL_LM = HeadSpec("causal LM", "AutoModelForCausalLM", "CAUSAL_LM")


def read_config(model: ModelConfig) -> PreTrainedConfig:
    """The config of the network that `model` names, without its weights."""
    return build_config(model.config) if model.config else located_config(model)[0]


def located_config(model: ModelConfig) -> tuple[PreTrainedConfig, str, str | None]:
    """The config in a folder, the folder and None; or that of a hub name, the name and its commit."""
    from transformers import AutoConfig

    if model.path is None:
        raise UserError(
            "no model is named", hint="set model.path=FOLDER_OR_HUB_NAME, or model.config.model_type=..."
        )
    where, commit = locate(model.path, model.revision, "model.path")
    if commit is None:
        check_folder(Path(where))
    with loading_errors(model.path, "model.path"):
        config = AutoConfig.from_pretrained(where, revision=commit, trust_remote_code=model.trust_remote_code)
    return config, where, commit


def build_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A config of transformers from `model.config`. UserError for an unknown type, field or value."""
    from transformers import CONFIG_MAPPING, AutoConfig

    given = dict(fields)
    kind = given.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"model.config.model_type={kind} is unknown",
            hint=did_you_mean(str(kind), CONFIG_MAPPING, "for example llama, qwen3, mistral"),
        )
    known = _config_fields(CONFIG_MAPPING[kind])
    for name in given:
        if name not in known and not _is_read(CONFIG_MAPPING[kind], name):
            raise UserError(
                f"model.config.{name} is not a field of {kind}",
                hint=did_you_mean(name, sorted(known), "see the documentation of its config in transformers"),
            )
    if given.get("output_router_logits"):
        raise UserError(
            "model.config.output_router_logits=true asks transformers for the loss of the routers",
            hint="leave it out; model.router_aux_loss_coef=0.001 adds that loss here",
        )
    try:
        return AutoConfig.for_model(kind, **given)
    except Exception as error:  # whatever the type's own code makes of these fields
        raise UserError(f"model.config of {kind} is not valid: {told(error)}") from error


def _config_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    names = set(config_class.attribute_map)
    with suppress(Exception):  # some types' own defaults are not valid
        names |= set(config_class().to_dict())
    for parent in config_class.__mro__:
        names |= set(vars(parent).get("__annotations__", ()))
    return {name for name in names if not name.startswith("_")}


def _is_read(config_class: type[PreTrainedConfig], name: str) -> bool:
    """Whether the type's own network asks for a field that its config does not declare: head_dim of
    qwen3_moe."""
    try:
        network = CAUSAL_LM.transformers_class._model_mapping[config_class]
    except KeyError:
        return False
    networks = network if isinstance(network, (list, tuple)) else [network]
    return any(re.search(rf"config(, \"|\.){re.escape(name)}\b", _source(each)) for each in networks)


def attention_for(config: PreTrainedConfig, head: HeadSpec) -> str | None:
    """Packed, or None (transformers' own) for an architecture whose documents run one by one.

    UserError, by its name, for one that is no decoder of text.
    """
    kind = _class_for(config, head)
    if kind is None and not type(config).__module__.startswith("transformers."):
        return attention.NAME  # code that comes with the weights
    if kind is None:
        raise UserError(
            f"model_type={config.model_type} does not make a {head.name}: transformers has no "
            f"{head.auto_class.removeprefix('AutoModelFor')} of it",
            hint="choose a decoder for which it has one, for example Llama, Qwen 3, Mistral",
        )
    what = _not_a_decoder(kind, config)
    if what is not None:
        raise attention.Unsupported(config.model_type, what)
    return attention.NAME if getattr(kind, "_supports_attention_backend", False) else None


def _class_for(config: PreTrainedConfig, head: HeadSpec) -> Any:
    try:
        kind = head.transformers_class._model_mapping[type(config)]
    except KeyError:
        return None
    return kind[0] if isinstance(kind, (list, tuple)) else kind


def _not_a_decoder(kind: type[PreTrainedModel], config: PreTrainedConfig) -> str | None:
    """What a class is that has more, or other, than a decoder of text; None for a decoder."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder and a decoder"
    # some decoders have the field too, and their code does not ask for it
    if getattr(config, "is_decoder", None) is False and re.search(ASKS_FOR_DECODER, _source(kind)):
        return "attention to later tokens (it is an encoder)"
    if "shared_kv_states" in inspect.signature(kind.forward).parameters:
        return "the keys and values of another model as its input (it drafts for that model)"
    return None


def why_not_packed(kind: type[PreTrainedModel], config: PreTrainedConfig) -> str | None:
    """What, by its class and config, a model has that packed attention does not reach; None: nothing.

    What can only be seen by running is found by `probes.isolate_documents`.
    """
    text = config.get_text_config(decoder=True)
    if not getattr(kind, "_supports_attention_backend", False):
        return "an attention of its own"
    other = set(getattr(text, "layer_types", None) or ()) - PACKED_LAYERS
    if other:
        return f"layers of type {', '.join(sorted(map(str, other)))}"
    if getattr(text, "sliding_window", None) and "sliding_window=" not in _source(kind):
        return "a sliding window that it does not hand to its attention"
    return None


def _source(kind: type) -> str:
    try:
        return inspect.getsource(sys.modules[kind.__module__])
    except (KeyError, OSError, TypeError):
        return ""


def router_loss_of(config: PreTrainedConfig) -> str | None:
    """`field=value` of the loss that a mixture's routers were trained with; None for other models.

    It is not computed unless `model.router_aux_loss_coef` asks for it (see `router_balance.py`), by default
    as in transformers, and that is said.
    """
    text = config.get_text_config(decoder=True)
    weighed = [(name, getattr(text, name, None)) for name in ROUTER_LOSSES]
    found = [f"{name}={weight:g}" for name, weight in weighed if isinstance(weight, float) and weight]
    return found[0] if found else None


def say_what_differs(config: PreTrainedConfig, model: ModelConfig) -> None:
    """Notices of what follows from a config and the settings alone."""
    own_way = [key for key in ("gradient_checkpointing", "compile") if getattr(model, key)]
    if own_way:
        notice("the last layer is computed at all positions", f"model.{own_way[0]}=true", WHOLE_LAYER)
    loss = router_loss_of(config)
    if loss and not model.router_aux_loss_coef:
        notice(
            f"the loss of the routers ({loss}) is not computed",
            f"model.router_aux_loss_coef=0, and model_type={config.model_type} has experts",
        )
