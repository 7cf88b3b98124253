"""Networks loaded in parts beside the same networks loaded whole, on every rank of a group."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.config import DeepSpeedConfig, Dtype, LoraConfig, ModelConfig, Offload
from common.model.architecture import CAUSAL_LM, HeadSpec
from common.model.loading import load_model
from common.model.partition import Share, part_of, share_of
from common.model.scalar_head import NEW_REWARD_MODEL, REWARD_MODEL
from common.runtime.distributed import World, init_world
from common.training.frozen import Frozen
from tests.packed import packed_lm, packed_scorer
from tests.programs import engines
from tests.tiny import CHATML, SHAPE, tiny_tokenizer

LORA = LoraConfig(enabled=True, r=2)
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FOLDERS: Mapping[str, tuple[type | str, dict[str, Any]]] = {
    "untied": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "bias": ("qwen2", {"tie_word_embeddings": True}),
    "experts": ("mixtral", EXPERTS),
    "small": ("llama", {"vocab_size": 97, "tie_word_embeddings": False}),
    "small_tied": ("llama", {"vocab_size": 97, "tie_word_embeddings": True}),
}
"""Saved models: their types and what their configs have besides `SHAPE`."""

WIDE = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
DRAWN: Mapping[str, dict[str, Any]] = {
    "llama": SHAPE, "qwen3": SHAPE, "mixtral": {**SHAPE, **EXPERTS}, "gemma3_text": SHAPE, "olmo2": SHAPE,
    "gpt_neox": WIDE, "phi": SHAPE, "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip
"""Fields of models that are made from a config. The blocks of gpt2 initialise the weights of their layers."""


def write(folder: Path) -> None:
    """One folder per saved model; `sharded` has several files, `scored` is a reward model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    size = len(tiny_tokenizer(CHATML))
    for name, (kind, fields) in FOLDERS.items():
        torch.manual_seed(len(name))
        config = AutoConfig.for_model(kind, **{**SHAPE, "vocab_size": size, **fields})
        model: Any = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        if name == "untied":
            model.save_pretrained(folder / "sharded", max_shard_size="30KB")
            config.num_labels, config.pad_token_id = 1, 0
            scored: Any = AutoModelForSequenceClassification.from_config(config)
            scored.save_pretrained(folder / "scored")


def cases(folder: Path) -> Iterator[tuple[str, ModelConfig, HeadSpec]]:
    for name in (*FOLDERS, "sharded"):
        for dtype in (Dtype.fp32, Dtype.bf16):
            yield f"{name} {dtype.value}", ModelConfig(path=str(folder / name), dtype=dtype), CAUSAL_LM
    for name in ("untied", "experts"):
        model = ModelConfig(path=str(folder / name), dtype=Dtype.bf16)
        yield f"{name} under a new head", model, NEW_REWARD_MODEL
    scored = ModelConfig(path=str(folder / "scored"), dtype=Dtype.fp32)
    yield "a reward model", scored, REWARD_MODEL
    for name in ("untied", "tied"):
        model = ModelConfig(path=str(folder / name), dtype=Dtype.fp32, lora=LORA)
        yield f"{name} with adapters", model, CAUSAL_LM
        yield f"{name} with adapters and a head", model, NEW_REWARD_MODEL
    for kind, fields in DRAWN.items():
        model = ModelConfig(config={"model_type": kind, **fields}, dtype=Dtype.bf16)
        yield f"drawn {kind}", model, CAUSAL_LM


def same_parts(folder: str) -> int:
    """Every case: names, shapes, values and what is trained, of each parameter and buffer."""
    init_world()
    share, tokenizer = share_of(3), tiny_tokenizer(CHATML)
    assert share == Share(dist.get_rank(), dist.get_world_size())
    notices = _notices()
    for name, model, head in cases(Path(folder)):
        notices.clear()
        whole = load_model(model, tokenizer, head, seed=3, device=torch.device("cpu"))
        said = list(notices)
        notices.clear()
        parts = load_model(model, tokenizer, head, seed=3, device=torch.device("cpu"), share=share)
        _compare(name, whole, parts, share, is_divided=name != "drawn gpt2")
        more = [line for line in notices if line not in said]
        assert len(more) == (name == "drawn gpt2"), (name, more)
        assert [type(m) for m in whole.modules()] == [type(m) for m in parts.modules()], name
        assert parts.training and parts.config.to_dict() == whole.config.to_dict(), name
    return 0


def _notices() -> list[str]:
    """Fills with what is said from now on."""
    said: list[str] = []

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("rlhf.notices").addHandler(Said())
    return said


def _compare(name: str, whole: Any, parts: Any, share: Share, *, is_divided: bool) -> None:
    divided = 0
    pairs = zip(whole.named_parameters(), parts.named_parameters(), strict=True)
    for (key, expected), (found_key, found) in pairs:
        assert key == found_key and expected.shape == found.shape, (name, key, found_key)
        assert expected.dtype == found.dtype and expected.requires_grad == found.requires_grad, (name, key)
        part = part_of(found)
        assert torch.equal(
            expected if part is None else share.of(expected.detach()), found if part is None else part
        ), (name, key)
        if part is not None:
            divided += expected.numel()
            assert found.isnan().all() and found.untyped_storage().nbytes() == found.element_size()
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert (divided > 0.9 * total) == is_divided, (name, divided, total)
    for (key, expected), (found_key, found) in zip(whole.named_buffers(), parts.named_buffers(), strict=True):
        assert key == found_key and torch.equal(expected, found), (name, key)


def same_losses(folder: str) -> int:
    """Training, with and without adapters, and a frozen model: bit for bit, beginning whole or in parts."""
    world = init_world()
    for dtype in (Dtype.bf16,) if world.size == 4 else (Dtype.fp32, Dtype.bf16):
        for name, lora in (("tied", LoraConfig()), ("untied", LORA), ("experts", LoraConfig())):
            model = ModelConfig(path=str(Path(folder) / name), dtype=dtype, lora=lora)
            _same(model, world)
        scored = ModelConfig(path=str(Path(folder) / "scored"), dtype=dtype)
        answers = [_scores(scored, share, world) for share in (None, share_of(3))]
        assert torch.equal(*answers) and answers[0].isfinite().all()
    offloaded: dict[str, Any] = {"offload_param": Offload.cpu, "offload_optimizer": Offload.cpu}
    for zero in (offloaded, {"hpz_partition_size": min(world.size, 2)}):
        _same(ModelConfig(path=str(Path(folder) / "untied"), dtype=Dtype.bf16), world, **zero)
    return 0


def _same(model: ModelConfig, world: World, **zero: Any) -> None:
    whole, parts = (_losses(model, share, world, **zero) for share in (None, share_of(3)))
    assert whole == parts and len(set(whole)) > 3, (model, zero, whole, parts)


def _losses(model: ModelConfig, share: Share | None, world: World, **zero: Any) -> list[float]:
    network = load_model(model, tiny_tokenizer(CHATML), seed=5, device=world.device, share=share)
    engine = engines.engine_of(packed_lm(network), 3, world, model.dtype, **zero)
    losses = []
    for step in range(engines.STEPS):
        for loss in engines.actor_losses(engine, world.rank, step):
            losses.append(float(loss.detach()))
            engine.backward(loss, 10.0)
        losses.append(engine.step().grad_norm)
    return losses


def linear_keeps_no_whole_weight(folder: str) -> int:
    """DeepSpeed's linear layer is in place, whose graph holds a partition instead of the gathered weight."""
    plain, world = torch.nn.functional.linear, init_world()
    _losses(ModelConfig(path=str(Path(folder) / "tied"), dtype=Dtype.bf16), share_of(3), world)
    assert torch.nn.functional.linear is not plain
    return 0


def _scores(model: ModelConfig, share: Share | None, world: World) -> torch.Tensor:
    tokenizer = tiny_tokenizer(CHATML)
    network = load_model(model, tokenizer, REWARD_MODEL, seed=5, device=world.device, share=share)
    settings = DeepSpeedConfig(stage=3)
    frozen = Frozen(packed_scorer(network), settings, dtype=model.dtype, world=world)
    return engines.of_critic(frozen, engines.document(world.rank))
