"""Every causal LM of the installed transformers, tiny: what becomes of its documents in a packed row.

    python -m benchmarks.architectures [FAMILY ...]

Of each family in transformers' mapping a model of some thousand random weights is made in fp32, loaded as a
step loads it (`common.model.loading`), and asked three documents of one packed row: logits and gradient have
to be those of plain transformers, document after document. What comes of it is one of: packed; one by one
(exact, slower); refused, with the reason, also where plain transformers cannot make it (for lack of a
package); not made, where no tiny config was found. Writes
results/architectures.md. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import logging
import platform
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from common.config import Dtype, ModelConfig
from common.errors import UserError
from common.model import attention

RESULTS = Path(__file__).parent / "results" / "architectures.md"

LOGITS_TOLERANCE = 1e-5
"""Of the largest logit, in fp32: sums in another order."""

GRADIENT_TOLERANCE = 1e-4
"""Of the gradient's norm over all weights: the same sums through the backward pass."""

LENGTHS = (13, 9, 21)
"""Longer than the tiny windows and chunks below."""

SECONDS = 60
LARGEST = 8_000_000
"""Weights: a config whose size was not found stays at its default of billions."""

VOCABULARY = 96

SMALL: dict[str, Any] = {
    # widths
    "hidden_size": 32, "hidden_size_global": 64,
    "n_embd": 32, "d_model": 32, "embed_dim": 32, "dim_model": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48, "n_inner": 48, "dim_ff": 48, "ffn_hidden_size": 48, "intermediate_size_mlp": 48,
    "dff": 48, "lru_width": 32, "attention_hidden_size": 32, "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "backbone_hidden_size": 32, "projection_dim": 32, "output_proj_dims": 32,
    # depth
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "num_blocks": 4,
    "decoder_layers": 4, "encoder_layers": 1, "max_window_layers": 2, "num_kv_shared_layers": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1, "num_nextn_predict_layers": 0,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 2, "head_dim": 8,
    "attention_head_dim": 8, "global_head_dim": 8, "kv_channels": 8, "dim_head": 8, "rotary_dim": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 8, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2,
    "top_k_experts": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24, "expert_ffn_hidden_size": 24,
    "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    # recurrences
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_ngroups": 1, "mamba_headdim": 8,
    "ssm_state_size": 8, "state_size": 8, "n_groups": 1, "mamba_dt_rank": 4, "time_step_rank": 4,
    "n_mamba_heads": 2,
    # tables and positions
    "encoder_hash_byte_group_vocab": 64,
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128, "n_ctx": 128,
    "type_vocab_size": 2,
    "sliding_window": 4, "attention_window": 4, "attention_window_size": 4, "attention_chunk_size": 8,
    "vocab_size_per_layer_input": VOCABULARY, "image_size": 16, "patch_size": 8,
}  # fmt: skip
"""What makes a config tiny, by the names that transformers' configs use. Fields that it lacks are not set."""

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "head_dim": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE["rope_parameters"])
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "blt_global_transformer": {"hidden_size": 64, "head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": LATENT | {f"swa_{name}": size for name, size in LATENT.items()},
    "dots3_note_text": LATENT | {f"swa_{name}": size for name, size in LATENT.items()},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp": QSA,
    "qwen4_exp_text": QSA,
    "zamba": {"attention_head_dim": 16, "num_key_value_heads": 4, "attention_hidden_size": 64},
    "zamba2": {"n_mamba_heads": 8, "num_key_value_heads": 4, "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What the names above do not make tiny or valid, by family."""


@dataclass(frozen=True)
class Outcome:
    """What became of a family. logits: largest difference, of the largest logit. gradient: of its norm."""

    family: str
    model: str
    result: str  # packed, one by one, refused, not made, wrong
    reason: str = ""
    logits: float | None = None
    gradient: float | None = None


def families() -> dict[str, str]:
    """Family to class, as transformers maps them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> Any:
    """A config of the class that the family's causal LM is made from, with some thousand weights."""
    import transformers

    kind = getattr(transformers, families()[family]).config_class
    if kind not in transformers.AutoModelForCausalLM._model_mapping:  # only found through the family's own
        kind = transformers.CONFIG_MAPPING[family]
    return _tiny(kind, EXTRA.get(family, {}))


def _tiny(config_class: Any, extra: dict[str, Any]) -> Any:
    from transformers import PreTrainedConfig

    default = config_class()
    known = set(default.to_dict()) | set(config_class.attribute_map)
    fields = {name: value for name, value in SMALL.items() if name in known and _has(default, name)}
    fields |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if "kv_lora_rank" in fields and _has(default, "kv_lora_rank"):
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 4)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(default, name, None)
        stored = config_class.attribute_map.get(name, name)
        if kinds and not isinstance(getattr(config_class, stored, None), property):
            fields[name] = (list(dict.fromkeys(kinds)) * 4)[:4]
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            fields[name] = _tiny(type(part), EXTRA.get(type(part).model_type, {})).to_dict()
    fields |= extra
    return config_class(**{name: value for name, value in fields.items() if value is not None})


def _has(config: Any, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except Exception:  # it differs from layer to layer, and its one value cannot be asked for
        return False


def try_family(family: str) -> Outcome:
    """Make it, load it as a step does, and compare; never raises."""
    name = families()[family]
    outcome = lambda result, reason="", **numbers: Outcome(family, name, result, reason, **numbers)  # noqa: E731
    try:
        with _time_limit(SECONDS):
            try:
                refuse_by_name(family)
            except UserError as error:
                return outcome("refused", _reason(error))
            try:
                config = tiny_config(family)
                plain = _plain(config)
            except Exception as error:
                if (reason := _refused_anyway(family)) is not None:
                    return outcome("refused", reason)
                return outcome("not made", f"{type(error).__name__}: {' '.join(str(error).split())}"[:160])
            try:
                return _compare(family, name, config, plain)
            except UserError as error:
                return outcome("refused", _reason(error))
    except Exception as error:
        return outcome("wrong", f"traceback: {type(error).__name__}: {' '.join(str(error).split())}"[:200])


def refuse_by_name(family: str) -> None:
    """UserError where the family's own config, at its full size, says that it is no decoder of text."""
    from transformers import CONFIG_MAPPING

    from common.model.architecture import CAUSAL_LM, attention_for

    try:
        config = CONFIG_MAPPING[family]()
    except Exception:  # its own defaults are not valid
        return
    attention_for(config, CAUSAL_LM)


def _refused_anyway(family: str) -> str | None:
    """What a user is told who names the family and nothing else; None where nothing speaks against it."""
    from common.model.architecture import CAUSAL_LM, build_config
    from common.model.loading import make_network

    try:
        with torch.device("meta"):
            make_network(build_config({"model_type": family}), ModelConfig(dtype=Dtype.fp32), CAUSAL_LM)
    except UserError as error:
        return _reason(error)[:200]
    return None


def _reason(error: UserError) -> str:
    """Without the family's name and what can be done: both are the same in every row."""
    text = " ".join(str(error).splitlines()[0].split())
    for parts in (" has ", " does not make a "):
        if text.startswith("model_type=") and parts in text:
            kept = text.partition(parts)[2].removesuffix(", which cannot be trained here")
            return kept if parts == " has " else f"no {kept}"
    return text


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} CPU-seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of CPU time
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _plain(config: Any) -> Any:
    """transformers' own, with weights that are nowhere near zero."""
    import transformers

    kind = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        weights = sum(p.numel() for p in kind.from_config(copy.deepcopy(config)).parameters())
    if weights > LARGEST:
        raise ValueError(f"{weights / 1e6:.0f} million weights")
    torch.manual_seed(0)
    model = kind.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model(input_ids=torch.arange(3, 15)[None], use_cache=False)
    return model


def load_as_a_step_does(config: Any, plain: Any) -> Any:
    """The network around the same weights, its documents kept apart. UserError: refused."""
    from common.model.architecture import CAUSAL_LM
    from common.model.loading import disable_dropout, make_network
    from common.model.probes import isolate_documents

    attention.register()
    network = make_network(copy.deepcopy(config), ModelConfig(dtype=Dtype.fp32), CAUSAL_LM)
    network.load_state_dict(plain.state_dict())
    network.tie_weights()
    isolate_documents(network)
    disable_dropout(network)
    return network


def _compare(family: str, name: str, config: Any, plain: Any) -> Outcome:
    from common.model.one_by_one import reason_of
    from common.model.packed import PackedCausalLM
    from common.model.probes import find_shortcuts

    network = load_as_a_step_does(config, plain)
    packed = PackedCausalLM(network, find_shortcuts(network)).eval()
    documents = [torch.randint(3, VOCABULARY, (length,)) for length in LENGTHS]
    with torch.no_grad():
        wanted = torch.cat([plain(input_ids=ids[None], use_cache=False).logits[0] for ids in documents])
        got = packed.logits(torch.cat(documents)[None], _boundaries())
    off = float((got - wanted).abs().max() / wanted.abs().max())
    gradient = _gradient_difference(packed, plain, documents)
    reason = reason_of(network) or ""
    result = "one by one" if reason else "packed"
    allowed = LOGITS_TOLERANCE
    if off > allowed:  # some models round more than others
        allowed = _own_noise(plain, documents)
        reason += f" (followed by other tokens, it differs from itself by {allowed:.1e})"
    if off > max(LOGITS_TOLERANCE, allowed) or gradient > GRADIENT_TOLERANCE:
        result = "wrong"
    return Outcome(family, name, result, reason.strip(), off, gradient)


@torch.no_grad()
def _own_noise(plain: Any, documents: list[torch.Tensor]) -> float:
    """How far a model's logits for a document are from those that it gives when other tokens follow."""
    largest = 0.0
    for document in documents:
        alone = plain(input_ids=document[None], use_cache=False).logits[0]
        longer = torch.cat([document, documents[0]])[None]
        followed = plain(input_ids=longer, use_cache=False).logits[0, : len(document)]
        largest = max(largest, float((alone - followed).abs().max() / alone.abs().max()))
    return largest


def _boundaries() -> torch.Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def _gradient_difference(packed: Any, plain: Any, documents: list[torch.Tensor]) -> float:
    """Norm of the difference of the summed loss's gradients over the norm of the plain one."""
    from common.model.attention import positions_within

    ids, bounds = torch.cat(documents), _boundaries()
    trained = torch.cat([torch.arange(a, b - 1) for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
    packed.zero_grad()
    result = packed(
        ids[None], positions_within(bounds, len(ids)), bounds, max(LENGTHS), trained, ids[trained + 1]
    )
    result.loss_sum.backward()
    plain.zero_grad()
    for document in documents:
        logits = plain(input_ids=document[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits.float(), document[1:], reduction="sum").backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in packed.base().named_parameters() if p.grad is not None}
    total = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs) ** 0.5
    return total / max(sum(float(g.square().sum()) for g in theirs.values()) ** 0.5, 1e-12)


def table(outcomes: list[Outcome]) -> str:
    """Markdown."""
    import transformers

    counts = Counter(outcome.result for outcome in outcomes)
    lines = [
        "# Architectures",
        "",
        f"`python -m benchmarks.architectures`, {datetime.date.today()}: transformers "
        f"{transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}, fp32.",
        "",
        "Tiny models with random weights; three documents in one packed row beside plain transformers one "
        f"document after the other. Allowed: {LOGITS_TOLERANCE:g} of the largest logit, "
        f"{GRADIENT_TOLERANCE:g} of the gradient's norm.",
        "",
        ", ".join(f"{count} {result}" for result, count in counts.most_common()) + ".",
        "",
        "| family | class | result | logits off by | gradient off by | reason |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for o in outcomes:
        numbers = ["" if x is None else f"{x:.1e}" for x in (o.logits, o.gradient)]
        reason = o.reason.replace("|", "\\|")
        lines.append(f"| {o.family} | {o.model} | {o.result} | {numbers[0]} | {numbers[1]} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="only these; the table is then printed, not written")
    wanted = parser.parse_args().families
    warnings.filterwarnings("ignore")
    logging.getLogger("rlhf").setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    outcomes = []
    for family in wanted or families():
        outcomes.append(try_family(family))
        print(f"{outcomes[-1].result:10} {family:24} {outcomes[-1].reason}", flush=True)
        gc.collect()
    if wanted:
        print(table(outcomes))
    else:
        RESULTS.write_text(table(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
