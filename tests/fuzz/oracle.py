"""Which settings may be taken, read from the fields of the schema alone: types, ranges, what goes together.

Written apart from `common/fields.py` and from the groups' own checks: where the two disagree, one is wrong.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from common.config import to_plain
from common.fields import Range
from pipeline.config import PipelineConfig

DEFAULTS = to_plain(PipelineConfig())
FREE_TEXT = ("run_name", "objective", "function", "functions", "url", "webhook", "servers")
"""Texts with a form of their own, of which nothing is known here: they may be refused."""
SWITCHES = {"true": True, "yes": True, "on": True, "y": True, "1": True}
SWITCHES |= {"false": False, "no": False, "off": False, "n": False, "0": False}
SIZES = (
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "head_dim",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "n_positions", "n_embd", "n_layer",
    "n_head",
)  # fmt: skip


class No(Exception):
    """The value that a key cannot have; the text is the key."""


def taken(declared: Any, value: Any, key: str, about: Mapping[str, Any]) -> Any:
    """The value as it is taken, groups as mappings and enums by name; `No` for one that must be refused."""
    if typing.get_origin(declared) is typing.Union:
        if value is None:
            return None
        declared = typing.get_args(declared)[0]
    if isinstance(value, str) and value == "???":
        raise No(key)
    if declared is Any:
        if _levels(value) > 20:
            raise No(key)
        return value
    items = typing.get_args(declared)
    if is_dataclass(declared):
        return _group(declared, _of(dict, value, key), f"{key}." if key else "")
    if typing.get_origin(declared) is list:
        each = enumerate(_of(list, value, key))
        return [taken(items[0], item, f"{key}[{at}]", about) for at, item in each]
    if typing.get_origin(declared) is dict:
        named = _of(dict, value, key).items()
        return {str(name): taken(items[1], item, f"{key}.{name}", about) for name, item in named}
    return _leaf(declared, value, key, about)


def _levels(value: Any) -> int:
    inner = list(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
    return 1 + max(map(_levels, inner)) if inner else 0


def _of(kind: type, value: Any, key: str) -> Any:
    if not isinstance(value, kind):
        raise No(key)
    return value


def _group(declared: Any, value: Mapping[str, Any], at: str) -> dict[str, Any]:
    known, types = {each.name: each for each in fields(declared)}, typing.get_type_hints(declared)
    if strange := [name for name in value if name not in known]:
        raise No(f"{at}{strange[0]}")
    return {
        name: taken(types[name], each, f"{at}{name}", known[name].metadata) for name, each in value.items()
    }


def _leaf(declared: Any, value: Any, key: str, about: Mapping[str, Any]) -> Any:
    is_switch, is_text = isinstance(value, bool), isinstance(value, str)
    try:
        if issubclass(declared, Enum):
            if is_text and value in declared.__members__:
                return value
        elif declared is str:
            if isinstance(value, str | int | float) and (str(value).strip() or about.get("empty_too")):
                return str(value).encode().decode()
        elif declared is bool:
            if isinstance(value, str | int) and str(value).lower() in SWITCHES:
                return SWITCHES[str(value).lower()]
        elif not is_switch and isinstance(value, str | int if declared is int else str | int | float):
            number = declared(value)
            if within(about["range"], number):
                return number
    except (ValueError, OverflowError):  # no number, one of too many digits, half a character
        pass
    raise No(key)


def within(allowed: Range, number: float) -> bool:
    """Whether a number is finite and between the ends, as far as these are allowed themselves."""
    if not math.isfinite(number) or (number == 0 and allowed.zero):
        return math.isfinite(number)
    too_low = number < allowed.minimum or (allowed.above and number == allowed.minimum)
    return not too_low and number <= allowed.maximum and not (allowed.below and number == allowed.maximum)


def merged(given: Any, defaults: Any) -> Any:
    """Settings with the defaults for what is not given."""
    if isinstance(given, Mapping) and isinstance(defaults, Mapping):
        return {**defaults, **{name: merged(each, defaults.get(name)) for name, each in given.items()}}
    return given


def holds(found: Any, expected: Any) -> bool:
    """Whether settings are those that were given, beside others; `auto` and null may be settled."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        return all(name in found and holds(found[name], each) for name, each in expected.items())
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(map(holds, found, expected))
    if expected in ("auto", None):
        return True
    return type(found) is type(expected) and (found == expected or found != found)


def without_sense(settings: Mapping[str, Any]) -> Iterator[str]:
    """What does not go together in settings of which each is allowed."""
    model, launch, zero = settings["model"], settings["launch"], settings["deepspeed"]
    trained = model["tokenizer"]["train_vocab_size"] is not None
    if settings["reward"]["train"]["entropy_every"] != 1:
        yield "the entropy of a model that predicts no tokens"
    if model["path"] is not None and (model["config"] or trained):
        yield "weights and a new model"
    if trained and model["tokenizer"]["path"] is not None:
        yield "two tokenizers"
    if model["quantize"] == "nf4" and not model["lora"]["enabled"]:
        yield "nothing to train in four bits"
    if model["quantize"] == "nf4" and model["config"]:
        yield "four bits of weights that are not there yet"
    if model["quantize"] == "nf4" and launch["read_once_per_node"]:
        yield "rounded tensors handed on"
    if model["checkpointing_policy"] != "full" and not model["gradient_checkpointing"]:
        yield "a way of recomputing, and nothing to recompute"
    is_whole = model["gradient_checkpointing"] and model["checkpointing_policy"] == "full"
    if (model["tiled_mlp"] or model["activation_offload"]) and (model["compile"] or not is_whole):
        yield "what is for layers recomputed in full, as they stand"
    if not model["lora"]["targets"]:
        yield "adapters of nothing"
    yield from _sizes(model["config"])
    if zero["offload_optimizer"] != "none" and zero["stage"] == 1:
        yield "an optimizer that is not sharded is elsewhere"
    if zero["stage"] < 3 and (zero["offload_param"] != "none" or zero["hpz_partition_size"] > 1):
        yield "parameters that are not sharded are elsewhere"
    if launch["node_rank"] is not None and launch["node_rank"] >= launch["nnodes"]:
        yield "a machine too many"
    if len(set(settings["tracking"]["to"])) < len(settings["tracking"]["to"]):
        yield "a mirror twice"
    if not settings["steps"] or len(settings["steps"]) > len(set(settings["steps"])):
        yield "steps twice, or none"
    for step in ("sft", "reward", "dpo", "ppo"):
        yield from _data(settings[step]["data"])
        yield from _optimizer(settings[step]["optim"])
    if settings["dpo"]["label_smoothing"] > 0 and settings["dpo"]["loss_type"] != "sigmoid":
        yield "labels that nothing smooths"
    yield from _ppo(settings["ppo"])


def _sizes(config: Mapping[str, Any]) -> Iterator[str]:
    given = {name: config[name] for name in SIZES if config.get(name) is not None}
    if any(not isinstance(size, int) or not 1 <= size <= 10_000_000 for size in given.values()):
        yield "a size of a network that is none"
        return
    for whole, part, *instead in (
        ("hidden_size", "num_attention_heads", "head_dim"), ("num_attention_heads", "num_key_value_heads"),
        ("n_embd", "n_head"),
    ):  # fmt: skip
        if whole in given and part in given and not set(instead) & set(given) and given[whole] % given[part]:
            yield f"{whole} in {part} parts"


def _data(data: Mapping[str, Any]) -> Iterator[str]:
    if data["path"] is not None and data["sources"]:
        yield "two ways to name rows"
    if data["eval_path"] is not None and data["eval_fraction"] is not None:
        yield "two ways to hold out rows"
    if data["eval_split"] is not None and data["eval_path"] is None:
        yield "a split of nothing"
    if set(data["chat_template_kwargs"]) & {
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    }:  # fmt: skip
        yield "a template's own variables"


def _optimizer(optim: Mapping[str, Any]) -> Iterator[str]:
    if len(optim["betas"]) != 2:
        yield "other than two rates"


def _rollout(rollout: Mapping[str, Any]) -> Iterator[str]:
    if rollout["engine"] != "vllm":
        if rollout["vllm"] != DEFAULTS["ppo"]["rollout"]["vllm"]:
            yield "settings of an engine that does not sample"
        return
    if rollout["temperature"] != 1 and (rollout["top_p"] != 1 or rollout["top_k"] != 0):
        yield "probabilities that vLLM does not tell"
    vllm = rollout["vllm"]
    if vllm["servers"] == [] or (vllm["servers"] is not None and vllm["cache_gb"] is not None):
        yield "servers without an address, or with a cache of ranks"
    for name in ("timeout", "allow_http"):
        if vllm["servers"] is None and vllm[name] != DEFAULTS["ppo"]["rollout"]["vllm"][name]:
            yield f"{name} of no server"
    if not rollout["gather_parameters"]:
        yield "layer by layer in another engine"
    if not rollout["cuda_graphs"]:
        yield "without the graphs of another engine"


def _ppo(ppo: Mapping[str, Any]) -> Iterator[str]:
    yield from _optimizer(ppo["critic"]["optim"])
    if ppo["train"]["export"] == "best":
        yield "the best of what cannot be compared"
    if ppo["train"]["stop_when"]["metric"] is not None and ppo["evaluation"]["num_prompts"] == 0:
        yield "no evaluation is waited for"
    demonstrations = {**ppo["ptx_data"], "eval_fraction": None}
    yield from _data(demonstrations)
    if demonstrations["eval_path"] is not None:
        yield "demonstrations that nobody evaluates"
    sources = [{"model": False, "function": None, "url": None, **source} for source in ppo["rewards"]]
    if any((s["model"], s["function"] is not None, s["url"] is not None).count(True) != 1 for s in sources):
        yield "a reward that scores with nothing, or twice"
    if not sources or sum(source["model"] for source in sources) > 1:
        yield "no rewards, or one twice"
    if ppo["estimator"] in ("grpo", "rloo") and ppo["rollout"]["samples_per_prompt"] < 2:
        yield "a group of one"
    if ppo["estimator"] != "gae" and ppo["critic"]["warmup_iterations"]:
        yield "a critic that is not there warms up"
    if ppo["kl"]["controller"] == "adaptive" and ppo["kl"]["coef"] == 0:
        yield "a factor of zero is adapted"
    yield from _rollout(ppo["rollout"])
    if ppo["data"]["max_length"] <= ppo["rollout"]["max_new_tokens"]:
        yield "no room for prompts"
