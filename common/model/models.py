"""The tokenizer and the network that a step trains, ready for packed batches.

Takes a `ModelConfig`; returns objects of transformers (or peft) with pad, eos and chat template settled,
vocabulary covered, packed attention in place and adapters attached. Weights come from safetensors in a
local folder or a hub repository pinned to a commit, or at random from a config. Does not tokenize rows,
wrap the loss, or know of DeepSpeed. What a reward model has above its decoder is in `scalar_head.py`.

Weights are loaded in `model.dtype`: DeepSpeed rounds parameters to that type and makes its fp32 masters
from the rounded ones, so loading in fp32 first would end in the same bits at twice the memory.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import logging
import os
import platform
import re
import shutil
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common.artifacts import disk_errors
from common.config import Dtype, ModelConfig, Quantize, dtype_on
from common.data.chat import find_terminators
from common.errors import UserError
from common.model import attention
from common.model.last_layer import WHOLE_LAYER
from common.model.one_by_one import decoder_of
from common.notices import notice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("rlhf.models")

TEMPLATE_FOLDER = Path(__file__).resolve().parents[2] / "conf" / "chat_template"
TRAINED_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

# Tokens that tokenizers ship for padding, or for nothing yet, or to end a text that is not a turn; in
# the order in which they are taken for padding.
SPARE_TOKENS = (
    r"<pad>|\[PAD\]|<\|pad\|>|<\|padding\|>|<\|finetune_right_pad_id\|>",
    r"<\|?reserved_special_token_\d+\|?>|<unused\d+>|<\|extra_\d+\|>|<SPECIAL_\d+>|<\|dummy_\d+\|>",
    r"<\|end_?of_?text\|>",
)


# --- Tokenizer ------------------------------------------------------------------------------------


def load_tokenizer(
    model: ModelConfig,
    training_texts: Callable[[], Iterator[str]] | None = None,
    save_to: Path | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer that `model` names, with a pad distinct from eos, an eos, and a chat template if named.

    From `model.tokenizer.path`, else trained on `training_texts()` to `model.tokenizer.train_vocab_size`,
    else from `model.path`. A trained one is kept in `save_to` and taken from there the next time, so that
    ranks and resumed runs agree. UserError: not found, not a fast tokenizer, no eos, no network.
    """
    size = model.tokenizer.train_vocab_size
    if model.tokenizer.path is not None:
        tokenizer = _read_tokenizer(model.tokenizer.path, None, "model.tokenizer.path", model)
    elif size is not None:
        tokenizer = _trained_tokenizer(size, training_texts, save_to)
    elif model.path is not None:
        tokenizer = _read_tokenizer(model.path, model.revision, "model.path", model)
    else:
        raise UserError(
            "model.config needs a tokenizer",
            hint="set model.tokenizer.path=FOLDER_OR_HUB_NAME or model.tokenizer.train_vocab_size=4096",
        )
    _set_template(tokenizer, model)
    _settle_eos(tokenizer)
    _settle_pad(tokenizer)
    return tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens; the same texts give the same tokenizer.

    Digits are tokens of their own, which makes arithmetic learnable for small models. Nothing is added
    around a text: templates write what is needed.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(TRAINED_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"model.tokenizer.train_vocab_size={vocab_size} is not allowed",
            hint=f"allowed: {smallest} or more (256 bytes and {len(TRAINED_SPECIAL_TOKENS)} special tokens)",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(TRAINED_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    trained.chat_template = read_template("chatml")
    return trained


def read_template(name: str) -> str:
    """The Jinja text of a named chat template, or of a file."""
    path = TEMPLATE_FOLDER / f"{name}.jinja"
    if not path.is_file():
        path = Path(name).expanduser()
    if not path.is_file():
        known = sorted(p.stem for p in TEMPLATE_FOLDER.glob("*.jinja"))
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f"model.chat_template={name} is neither a template nor a file",
            hint=(f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known)}",
        )
    return path.read_text(encoding="utf-8")


def terminators_of(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids that end a turn, ascending: what the chat template ends turns with, or eos without one."""
    if tokenizer.chat_template:
        return find_terminators(tokenizer)
    return (cast(int, tokenizer.eos_token_id),)


def _read_tokenizer(path: str, revision: str | None, key: str, model: ModelConfig) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    where, commit = _locate(path, revision, key)
    with _loading_errors(path, key):
        tokenizer = AutoTokenizer.from_pretrained(
            where, revision=commit, trust_remote_code=model.trust_remote_code
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{key}={path} has a slow tokenizer ({type(tokenizer).__name__})",
            hint="character offsets are needed to place masks: name a tokenizer with a tokenizer.json",
        )
    return tokenizer


def _trained_tokenizer(
    size: int, texts: Callable[[], Iterator[str]] | None, save_to: Path | None
) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    if save_to is not None and (save_to / "tokenizer.json").is_file():
        return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(save_to))
    if texts is None:
        raise ValueError("training a tokenizer needs texts")
    tokenizer = train_tokenizer(texts(), size)
    if len(tokenizer) < size:
        notice(
            f"the tokenizer has {len(tokenizer)} tokens, not the {size} of model.tokenizer.train_vocab_size",
            "the texts give no more",
        )
    if save_to is None:
        return tokenizer
    _keep(tokenizer, save_to)
    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(save_to))


def _keep(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save into `folder` by a rename: it is there whole or not at all. The first of several nodes wins."""
    partial = folder.with_name(f".{folder.name}.{platform.node()}.{os.getpid()}.tmp")
    with disk_errors(folder):
        partial.mkdir(parents=True)
        tokenizer.save_pretrained(partial)
        try:
            os.replace(partial, folder)
        except OSError:
            shutil.rmtree(partial)
            if not (folder / "tokenizer.json").is_file():
                raise


def _set_template(tokenizer: PreTrainedTokenizerFast, model: ModelConfig) -> None:
    """The template that was named, whatever the tokenizer had; ChatML's two tokens are added if missing."""
    name = model.chat_template
    if name is None:
        return
    if tokenizer.chat_template:
        notice("the tokenizer's own chat template is not used", f"model.chat_template={name} is set")
    text = read_template(name)
    tokenizer.chat_template = text
    known = tokenizer.get_vocab()
    missing = [token for token in CHATML_TOKENS if token in text and token not in known]
    if missing:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": missing}, replace_extra_special_tokens=False
        )
        notice(f"{', '.join(missing)} are added to the vocabulary", "the chat template writes them")


def _settle_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.eos_token is not None:
        return
    ends = find_terminators(tokenizer) if tokenizer.chat_template else ()
    if not ends:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no eos token and no chat template that ends turns",
            hint="set model.chat_template=chatml, or name a tokenizer with an eos token",
        )
    tokenizer.eos_token = cast(str, tokenizer.convert_ids_to_tokens(ends[0]))
    log.info("eos is %s, with which the chat template ends turns", tokenizer.eos_token)


def _settle_pad(tokenizer: PreTrainedTokenizerFast) -> None:
    """A pad that is neither eos nor a terminator: where they are one, a model never learns to stop."""
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, *_terminators_or_none(tokenizer)}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    spare = _spare_token(tokenizer, taken)
    if spare is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        notice("<pad> is added to the vocabulary", "the tokenizer has no pad distinct from its terminators")
    else:
        tokenizer.pad_token = spare
        log.info("pad is %s: the tokenizer had none distinct from its terminators", spare)


def _terminators_or_none(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    try:
        return terminators_of(tokenizer)
    except UserError:  # reported where the template is checked
        return ()


def _spare_token(tokenizer: PreTrainedTokenizerFast, taken: set[Any]) -> str | None:
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    tokens = {str(token): id for id, token in sorted(tokenizer.added_tokens_decoder.items())}
    free = [name for name, id in tokens.items() if id not in taken and name not in template]
    for pattern in SPARE_TOKENS:
        found = [name for name in free if re.fullmatch(pattern, name)]
        if found:
            return found[0]
    return None


# --- Model ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadSpec:
    """What a network has above its decoder, and what follows from that when it is loaded."""

    name: str  # for error messages
    auto_class: str  # of transformers
    task_type: str  # of peft
    fields: Mapping[str, Any] = field(default_factory=dict)  # that the config must have
    made_new: tuple[str, ...] = ()  # tensors that the weights may lack
    left_out: tuple[str, ...] | None = None  # the only ones they may have besides; None: any, with a warning


CAUSAL_LM = HeadSpec("causal LM", "AutoModelForCausalLM", "CAUSAL_LM")


def load_model(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    device: torch.device,
    max_length: int | None = None,
) -> PreTrainedModel:
    """The causal LM on `device` in `model.dtype`, in training mode, with packed attention.

    With adapters it is a PeftModel around it. Everything random comes from `seed` and is the same on every
    rank; the caller's generators are left as they were. `max_length` is checked against the context.
    UserError for whatever the user named wrongly or what packing would train wrongly.
    """
    from common.model.losses import check_packed

    return load_network(
        model, tokenizer, CAUSAL_LM, check_packed, seed=seed, device=device, max_length=max_length
    )


def load_network(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerFast,
    head: HeadSpec,
    prepare: Callable[[PreTrainedModel], None],
    *,
    seed: int,
    device: torch.device,
    max_length: int | None = None,
) -> PreTrainedModel:
    """`load_model` for any head. `prepare` is called with the network on `device`, before adapters are
    added; it completes it, and raises UserError when packing would train it wrongly.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from common.model.adapters import add_adapters

    model = replace(model, dtype=dtype_on(model.dtype, gpu=device.type == "cuda"))
    attention.register()
    attention.say_without_flash(device, torch_dtype(model.dtype))
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        network = _from_config(model, tokenizer, head) if model.config else _from_weights(model, device, head)
        _check_context(network.config, max_length)
        _cover_vocabulary(network, tokenizer, model)
        _set_token_ids(network, tokenizer)
        if model.quantize is Quantize.none:  # 4-bit weights are made where they stay
            cast(Any, network).to(device)
        prepare(network)
        say_what_differs(network.config, model)
        if model.gradient_checkpointing:
            _enable_checkpointing(network)
        if model.compile:
            _compile_layers(network)
        if model.lora.enabled:
            network = add_adapters(network, model.lora, head.task_type)
    return network.train()


def disable_dropout(network: torch.nn.Module) -> None:
    """Turn off the model's own dropout, in training mode too; adapters keep theirs, configs are left alone.

    Where two passes over a model are compared, as preferences do, dropout is noise in what is compared.
    """
    import torch

    for name, module in network.named_modules():
        if ".lora_" in name:
            continue
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():  # for example attention_dropout
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


def adapters_off(module: torch.nn.Module) -> AbstractContextManager[None]:
    """While the block runs, what peft wrapped inside of `module` is its base; without peft nothing changes.

    peft stops and resumes gradients of the adapters with it: no backward pass inside, nor across its borders.
    """
    # asked of the type: peft's wrappers find attributes of what they wrap as well
    wrapped = [part for part in module.modules() if hasattr(type(part), "disable_adapter")]
    return cast(Any, wrapped[0]).disable_adapter() if wrapped else nullcontext()


ROUTER_LOSSES = ("router_aux_loss_coef", "aux_loss_alpha", "aux_loss_coef", "router_z_loss_coef")
"""Fields by which configs weigh a loss of their routers."""


def router_loss_of(config: PreTrainedConfig) -> str | None:
    """`field=value` of the loss that a mixture's routers were trained with; None for other models.

    It is a product of means over tokens (a share of the tokens times a mean probability, expert by expert):
    not a sum over tokens, so a mean of micro-batches depends on how a batch is cut, and the exact one needs
    every token routed once before the first backward pass. It is therefore not computed, by default as in
    transformers, and that is said.
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
    if loss:
        notice(
            f"the loss of the routers ({loss}) is not computed",
            f"model_type={config.model_type} has experts, and no sum over tokens is what it is",
        )


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """torch's name for it. KeyError for `auto`, which is settled before a step begins."""
    import torch

    return {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32}[dtype]


def build_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A transformers config from `model.config`. UserError for an unknown type, field or value."""
    from transformers import CONFIG_MAPPING, AutoConfig

    given = dict(fields)
    kind = given.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"model.config.model_type={kind} is unknown",
            hint=_nearest(str(kind), list(CONFIG_MAPPING), "for example llama, qwen3, mistral"),
        )
    known = _config_fields(CONFIG_MAPPING[kind])
    for name in given:
        if name not in known:
            raise UserError(
                f"model.config.{name} is not a field of {kind}",
                hint=_nearest(name, sorted(known), "see the documentation of its config in transformers"),
            )
    if given.get("output_router_logits"):
        raise UserError(
            "model.config.output_router_logits=true asks for the loss of the routers, which is not computed",
            hint="leave it out; experts are then balanced by nothing but the loss of the step",
        )
    try:
        return AutoConfig.for_model(kind, **given)
    except Exception as error:  # whatever the type's own code makes of these fields
        raise UserError(f"model.config of {kind} is not valid: {_told(error)}") from error


def _config_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    names = set(config_class.attribute_map)
    with suppress(Exception):  # some types' own defaults are not valid
        names |= set(config_class().to_dict())
    for parent in config_class.__mro__:
        names |= set(vars(parent).get("__annotations__", ()))
    return {name for name in names if not name.startswith("_")}


def _from_config(model: ModelConfig, tokenizer: PreTrainedTokenizerFast, head: HeadSpec) -> PreTrainedModel:
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
    return make_network(config, model, head)


def make_network(config: PreTrainedConfig, model: ModelConfig, head: HeadSpec) -> PreTrainedModel:
    """Random weights for a config, in `model.dtype`. UserError for what is no decoder of text."""
    implementation = attention_for(config, head)
    try:
        return _auto_class(head).from_config(
            config, dtype=torch_dtype(model.dtype), attn_implementation=implementation
        )
    except Exception as error:  # whatever the type's own code makes of these fields
        raise UserError(
            f"model_type={config.model_type} does not make a {head.name}: {_told(error)}",
            hint="use a decoder, for example llama, qwen3, mistral",
        ) from error


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
    """transformers' class for the config; None where it has none."""
    try:
        kind = _auto_class(head)._model_mapping[type(config)]
    except KeyError:
        return None
    return kind[0] if isinstance(kind, (list, tuple)) else kind


ASKS_FOR_DECODER = r"(=|if|not) (self\.)?config\.is_decoder"


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


def _source(kind: type) -> str:
    try:
        return inspect.getsource(sys.modules[kind.__module__])
    except (KeyError, OSError, TypeError):
        return ""


def _told(error: BaseException) -> str:
    """A KeyError's text alone is a key."""
    return f"{type(error).__name__}: {_one_line(error)}"


def _auto_class(head: HeadSpec) -> Any:
    import transformers

    return getattr(transformers, head.auto_class)


def read_config(model: ModelConfig) -> PreTrainedConfig:
    """The config of the network that `model` names, without its weights."""
    return build_config(model.config) if model.config else _located_config(model)[0]


def _located_config(model: ModelConfig) -> tuple[PreTrainedConfig, str, str | None]:
    """The config in a folder, the folder and None; or that of a hub name, the name and its commit."""
    from transformers import AutoConfig

    if model.path is None:
        raise UserError(
            "no model is named", hint="set model.path=FOLDER_OR_HUB_NAME, or model.config.model_type=..."
        )
    where, commit = _locate(model.path, model.revision, "model.path")
    if commit is None:
        _check_folder(Path(where))
    with _loading_errors(model.path, "model.path"):
        config = AutoConfig.from_pretrained(where, revision=commit, trust_remote_code=model.trust_remote_code)
    return config, where, commit


def _from_weights(model: ModelConfig, device: torch.device, head: HeadSpec) -> PreTrainedModel:
    config, where, commit = _located_config(model)
    path, options = str(model.path), dict(head.fields)
    options["attn_implementation"] = attention_for(config, head)
    if model.quantize is Quantize.nf4:
        options |= {"quantization_config": _nf4(device), "device_map": {"": device}}
    with _loading_errors(path, "model.path"), _quiet_report():
        loaded: Any = _auto_class(head).from_pretrained(
            where,
            revision=commit,
            dtype=torch_dtype(model.dtype),
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    network, report = loaded
    _check_report(report, path, head)
    if commit is not None:
        log.info("model.path=%s is commit %s", path, commit)
    return network


def _nf4(device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    if device.type != "cuda":
        raise UserError(
            "model.quantize=nf4 needs a CUDA GPU",
            hint="leave model.quantize out: adapters alone work anywhere",
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"model.quantize=nf4 needs bitsandbytes ({_one_line(error)})", hint="install the extra: .[gpu]"
        ) from error
    import torch

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


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
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, model: ModelConfig
) -> None:
    """Grow the embeddings until every token id has a row; never shrink them."""
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
    settings.eos_token_id = sorted({*_terminators_or_none(tokenizer), cast(int, tokenizer.eos_token_id)})
    network.generation_config = settings


def _enable_checkpointing(network: PreTrainedModel) -> None:
    if not network.supports_gradient_checkpointing:
        raise UserError(
            f"model_type={network.config.model_type} cannot recompute activations",
            hint="set model.gradient_checkpointing=false",
        )
    # renamed in the course of transformers 5
    enable = (
        getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def _compile_layers(network: PreTrainedModel) -> None:
    layers = getattr(decoder_of(network), "layers", None)
    if layers is None:
        raise UserError(
            f"model_type={network.config.model_type} has no list of layers to compile",
            hint="set model.compile=false",
        )
    for layer in layers:
        layer.compile()


# --- Finding things, and saying what is wrong -------------------------------------------------------


def _locate(path: str, revision: str | None, key: str) -> tuple[str, str | None]:
    """(folder, None) for a local path, (hub name, commit) for a hub model."""
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local), None
    if local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        found = "is a file" if local.exists() else "does not exist"
        raise UserError(f"{key}={path} {found}", hint="name a model's folder, or a hub model org/name")
    return path, _hub_commit(path, revision, key)


def _hub_commit(name: str, revision: str | None, key: str) -> str:
    """The commit behind a branch, or behind the default branch: everything is then loaded from it."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    options: dict[str, Any] = {"revision": revision, "local_files_only": not _hub_answers()}
    with _loading_errors(name, key, revision):
        file = cached_file(
            name, "config.json", _raise_exceptions_for_missing_entries=False, **options
        ) or cached_file(name, "tokenizer_config.json", **options)
    commit = extract_commit_hash(file, None)
    if commit is None:
        raise RuntimeError(f"no commit in {file}")
    return commit


def _hub_answers(seconds: float = 5.0) -> bool:
    """Whether the hub's host takes connections; its client would retry for most of a minute to find out.

    Behind a proxy only the client can tell, and is let to.
    """
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), seconds).close()
    except OSError:
        return False
    return True


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"model.path={folder} has no config.json", hint="name the folder of a saved model")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is not JSON: {error}", hint="get the model again") from error
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"model.path={folder} has its weights in {pickles[0]}, a pickle, which can run code when loaded",
            hint="convert it to safetensors: load it where you trust it and call save_pretrained",
        )
    raise UserError(f"model.path={folder} has no weights (*.safetensors)", hint="get the model again")


@contextmanager
def _loading_errors(name: str, key: str, revision: str | None = None) -> Iterator[None]:
    """Say what went wrong while loading in terms of what the user named."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from safetensors import SafetensorError

    at = name if revision is None else f"{name} (revision {revision})"
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"a weight file of {key}={at} is damaged: {_one_line(error)}", hint="get the model again"
        ) from error
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        if Path(name).expanduser().is_dir():
            raise UserError(f"{key}={at} cannot be loaded: {_one_line(error)}") from error
        raise _hub_error(at, key, error) from error
    except UserError:
        raise
    except Exception as error:  # whatever an architecture's own code makes of these files
        text = _one_line(error)
        if "trust_remote_code" in text or "custom code" in text:
            raise UserError(
                f"{key}={at} comes with Python code of its own",
                hint="read that code; to run it set model.trust_remote_code=true",
            ) from error
        if "mismatched" in text:
            text = "the shapes of its weights are not those its config.json says"
        elif not isinstance(error, (ValueError, ImportError)):
            text = _told(error)
        raise UserError(f"{key}={at} cannot be loaded: {text}") from error


def _hub_error(at: str, key: str, error: Exception) -> UserError:
    text = f"{error} {error.__cause__}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    if offline or "connect" in text.lower() or "offline" in text.lower():
        return UserError(
            f"{key}={at} is not a local folder, not in the cache, and the hub cannot be reached",
            hint="check the name and the network, or download it elsewhere and name the folder",
        )
    if "safetensors" in text:
        return UserError(
            f"{key}={at} has no safetensors weights; pickles can run code and are not loaded",
            hint="choose a revision or a model with safetensors",
        )
    return UserError(
        f"{key}={at} cannot be loaded from the hub: {_one_line(error)}",
        hint="check the name, the revision, and (gated models) that you are logged in: hf auth login",
    )


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


def _nearest(word: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else otherwise


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _one_line(error: BaseException, width: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= width else text[: width - 3] + "..."
