"""The network that a step trains, ready for packed batches.

Takes a `ModelConfig` and its tokenizer; returns a model of transformers (or peft) with the vocabulary
covered, packed attention in place and adapters attached. Weights come from safetensors in a local folder or a
hub repository pinned to a commit, or at random from a config. Does not wrap the loss, or know of DeepSpeed.
What a network has above its decoder is told by a `HeadSpec`: `CAUSAL_LM`, or one of `scalar_head.py`.

Weights are loaded in `model.dtype`: DeepSpeed rounds parameters to that type and makes its fp32 masters
from the rounded ones, so loading in fp32 first would end in the same bits at twice the memory.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from common.config import Dtype, ModelConfig, Quantize, dtype_on
from common.errors import UserError
from common.model import attention, loss_kernel
from common.model.adapters import add_adapters
from common.model.architecture import (
    CAUSAL_LM,
    HeadSpec,
    attention_for,
    build_config,
    located_config,
    read_config,
    say_what_differs,
)
from common.model.compiled import compile_layers
from common.model.hub import loading_errors
from common.model.miniature import NoMiniature
from common.model.nf4 import keep_one_layout, nf4_config
from common.model.partition import Share, drawing_shares, grown_whole, reading_shares, to_device
from common.model.probes import isolate_documents
from common.model.recomputation import recompute_layers
from common.model.tokenizer import ending_tokens
from common.notices import notice
from common.parts import why_whole
from common.runtime.distributed import Node
from common.text import told

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("rlhf.models")


def load_model(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    head: HeadSpec = CAUSAL_LM,
    *,
    seed: int,
    device: torch.device,
    max_length: int | None = None,
    share: Share | None = None,
    node: Node | None = None,
) -> PreTrainedModel:
    """The network on `device` in `model.dtype`, in training mode, with packed attention.

    With adapters it is a PeftModel around it. Everything random comes from `seed` and is the same on every
    rank; the caller's generators are left as they were. `max_length` is checked against the context. share:
    of this rank, which then holds no other part of the matrices (see `partition.py`); None: the whole. node:
    of which one rank reads the files for the others, which all call this; None: each reads them.
    UserError for whatever the user named wrongly or what packing would train wrongly.
    """
    model = replace(model, dtype=dtype_on(model.dtype, gpu=device.type == "cuda"))
    attention.register()
    loss_kernel.say_without_kernel(device)
    share = _possible(share, model)
    try:
        return _ready(model, tokenizer, head, seed, device, max_length, share, node).train()
    except NoMiniature as error:
        _say_whole(f"{error}, and is tried out by running it")
        return _ready(model, tokenizer, head, seed, device, max_length, None, node).train()


def _ready(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    head: HeadSpec,
    seed: int,
    device: torch.device,
    max_length: int | None,
    share: Share | None,
    node: Node | None,
) -> PreTrainedModel:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        if model.config:
            network = _from_config(model, tokenizer, head, seed, device, share)
        else:
            network = _from_weights(model, device, head, share, node)
        _check_context(network.config, max_length)
        _cover_vocabulary(network, tokenizer, model, share)
        _set_token_ids(network, tokenizer)
        if model.quantize is Quantize.none:  # 4-bit weights are made where they stay
            to_device(network, device)
        head.settle(network, model, seed)
        isolate_documents(network)
        say_what_differs(network.config, model)
        if model.gradient_checkpointing:
            recompute_layers(network, model, device)
        if model.compile:
            compile_layers(network)
        if model.lora.enabled:
            network = add_adapters(network, model.lora, head.task_type)
    return network


def _possible(share: Share | None, model: ModelConfig) -> Share | None:
    """The share, or None and a notice where every rank has to make the whole network first."""
    if share is None or (reason := why_whole(model)) is None:
        return share
    _say_whole(reason)
    return None


def disable_dropout(network: torch.nn.Module) -> None:
    """Turn off the model's own dropout, in training mode too; adapters keep theirs, configs are left alone.

    Where two passes over a model are compared, as preferences do, dropout is noise in what is compared.
    """
    for name, module in network.named_modules():
        if ".lora_" in name:
            continue
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():  # for example attention_dropout
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """torch's name for it. KeyError for `auto`, which is settled before a step begins."""
    return {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32}[dtype]


def _from_config(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    head: HeadSpec,
    seed: int,
    device: torch.device,
    share: Share | None,
) -> PreTrainedModel:
    attention_for(read_config(model), head)  # before fields are added, which not every type has
    fields = {"vocab_size": len(tokenizer), **model.config}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))  # the type's own ids lie in another vocabulary
    if fields["vocab_size"] < len(tokenizer):
        raise UserError(
            f"model.config.vocab_size={fields['vocab_size']}, but the tokenizer has {len(tokenizer)} tokens",
            hint="leave vocab_size out: it is then the tokenizer's",
        )
    config = build_config(fields)
    config.update(dict(head.fields))
    _set_config_ids(config, tokenizer)
    if share is None:
        return make_network(config, model, head)
    try:
        with drawing_shares(share, device):
            return make_network(config, model, head)
    except UserError:
        torch.default_generator.manual_seed(seed)
        network = make_network(config, model, head)
        _say_whole(f"a new model_type={config.model_type} cannot be drawn module by module")
        return network


def _say_whole(why: str) -> None:
    notice("every rank loads all weights before they are partitioned", why, "host memory of the whole model")


def make_network(config: PreTrainedConfig, model: ModelConfig, head: HeadSpec) -> PreTrainedModel:
    """Random weights for a config, in `model.dtype`. UserError for what is no decoder of text."""
    implementation = attention_for(config, head)
    try:
        return head.transformers_class.from_config(
            config, dtype=torch_dtype(model.dtype), attn_implementation=implementation
        )
    except Exception as error:  # whatever the type's own code makes of these fields
        raise UserError(
            f"model_type={config.model_type} does not make a {head.name}: {told(error)}",
            hint="use a decoder, for example llama, qwen3, mistral",
        ) from error


def _from_weights(
    model: ModelConfig, device: torch.device, head: HeadSpec, share: Share | None, node: Node | None
) -> PreTrainedModel:
    config, where, commit = located_config(model)
    path, options = str(model.path), dict(head.fields)
    options["attn_implementation"] = attention_for(config, head)
    if model.quantize is Quantize.nf4:
        options |= {"quantization_config": nf4_config(torch_dtype(model.dtype)), "device_map": {"": device}}
    is_plain = share is None and node is None
    divided = nullcontext() if is_plain else reading_shares(share, device, node)
    with loading_errors(path, "model.path"), _quiet_report(), divided:
        loaded: Any = head.transformers_class.from_pretrained(
            where,
            revision=commit,
            dtype=torch_dtype(model.dtype),
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    network, report = loaded
    keep_one_layout(network)
    _check_report(report, path, head)
    if commit is not None:
        log.info("model.path=%s is commit %s", path, commit)
    return network


def _check_report(report: Mapping[str, Any], path: str, head: HeadSpec) -> None:
    """A model with parts made up at random is not the model that was named."""
    missing = sorted(set(report["missing_keys"]) - set(head.made_new))
    if missing:
        raise UserError(
            f"model.path={path} lacks {len(missing)} of the model's tensors: {_first(missing)}",
            hint="the weights do not belong to this config.json, or are incomplete: get the model again",
        )
    unexpected = sorted(set(report["unexpected_keys"]) - set(head.left_out or ()))
    if unexpected and head.left_out is not None:
        raise UserError(
            f"model.path={path} has tensors that a {head.name} has no place for: {_first(unexpected)}",
            hint="the weights do not belong to this config.json: get the model again",
        )
    if unexpected:
        notice(
            f"{len(unexpected)} tensors of model.path={path} are not used",
            f"this model has no place for {_first(unexpected)}",
        )


def _check_context(config: PreTrainedConfig, max_length: int | None) -> None:
    text = config.get_text_config(decoder=True)
    context = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or {}
    if not max_length or not context:
        return
    stretched = scaling.get("original_max_position_embeddings") or context
    context = max(context, int(stretched * (scaling.get("factor") or 1)))
    if max_length > context:
        raise UserError(
            f"data.max_length={max_length} is more than the model's context of {context} tokens",
            hint=f"set data.max_length={context} or less",
        )


def _cover_vocabulary(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, model: ModelConfig, share: Share | None
) -> None:
    """Grow the embeddings, which are whole meanwhile, until every token id has a row; never shrink them."""
    rows = cast(Any, network.get_input_embeddings()).weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed <= rows:
        return
    new = [
        token for token, id in tokenizer.get_vocab().items() if id >= rows and token != tokenizer.pad_token
    ]
    if new and model.lora.enabled:
        raise UserError(
            f"the model has no embeddings for {_first(sorted(new))}, and adapters would not train them",
            hint="set model.chat_template=plain or alpaca, which need no new tokens, or train all weights",
        )
    with grown_whole(network, share):
        network.resize_token_embeddings(needed, mean_resizing=True)
    notice(f"embeddings grow from {rows} to {needed} rows", "the tokenizer has more tokens than the model")


def _set_config_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    text = config.get_text_config(decoder=True)
    for target in (config, text):
        target.bos_token_id = tokenizer.bos_token_id
        target.eos_token_id = tokenizer.eos_token_id
        target.pad_token_id = tokenizer.pad_token_id


def _set_token_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Generation stops at whatever ends a turn; the rest of the base model's settings stay."""
    _set_config_ids(network.config, tokenizer)
    network.config.use_cache = False
    if not network.can_generate():
        return
    settings = copy.deepcopy(network.generation_config)
    settings._from_model_config = False
    settings.bos_token_id = tokenizer.bos_token_id
    settings.pad_token_id = tokenizer.pad_token_id
    settings.eos_token_id = sorted(ending_tokens(tokenizer))
    network.generation_config = settings


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Without transformers' table of missing tensors: what matters in it is an error of ours."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
