from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from common.config import CheckpointingPolicy, Dtype, LoraConfig, ModelConfig, Quantize
from common.errors import UserError
from common.model.attention import packed_arguments, plain_attention, positions_within
from common.model.loading import load_model
from common.model.tokenizer import train_tokenizer
from tests.packed import packed_lm
from tests.tiny import CHATML, SHAPE, tiny_tokenizer

CPU = torch.device("cpu")


def config(**changes: object) -> ModelConfig:
    fields = {"config": {"model_type": "llama", **SHAPE}, "dtype": Dtype.fp32, **changes}
    return ModelConfig(**fields)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved model and tokenizer; the vocabulary has the tokenizer's size."""
    tokenizer = tiny_tokenizer(CHATML)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **SHAPE))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit_weights(folder: Path, edit: object) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)  # type: ignore[operator]
    save_file(state, path, metadata={"format": "pt"})


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (load_model(config(), tokenizer, seed=3, device=CPU) for _ in range(2))
    other = load_model(config(), tokenizer, seed=4, device=CPU)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert len(pairs) > 10 and all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_model_from_a_config_takes_vocabulary_and_ids_from_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    model = load_model(config(), tokenizer, seed=0, device=CPU)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    # both what ends a turn and what ends a text
    assert model.generation_config.eos_token_id == [2, 4]
    assert model.config._attn_implementation == "packed" and not model.config.use_cache and model.training


@pytest.mark.parametrize("dtype", [Dtype.bf16, Dtype.fp16, Dtype.fp32])
def test_weights_have_the_dtype_asked_for(dtype: Dtype) -> None:
    model = load_model(config(dtype=dtype), tiny_tokenizer(CHATML), seed=0, device=CPU)
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype.value]
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused() -> None:
    model = config(config={"model_type": "llama", **SHAPE, "vocab_size": 100})
    with pytest.raises(UserError, match="model.config.vocab_size=100"):
        load_model(model, tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_rows_longer_than_the_context_are_refused_before_training() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    load_model(config(), tokenizer, seed=0, device=CPU, max_length=64)
    with pytest.raises(UserError, match="data.max_length=65.*context of 64 tokens"):
        load_model(config(), tokenizer, seed=0, device=CPU, max_length=65)


def test_a_local_model_is_loaded_as_it_was_saved(base: Path) -> None:
    model = load_model(
        ModelConfig(path=str(base), dtype=Dtype.fp32), tiny_tokenizer(CHATML), seed=9, device=CPU
    )
    written = load_file(base / "model.safetensors")
    assert {n for n, _ in model.named_parameters()} == set(written)
    assert all(torch.equal(p, written[n]) for n, p in model.named_parameters())


def test_a_missing_tensor_is_refused_rather_than_made_up(base: Path) -> None:
    edit_weights(base, lambda state: state.pop("model.norm.weight"))
    with pytest.raises(UserError, match="lacks 1 of the model's tensors: model.norm.weight"):
        load_model(ModelConfig(path=str(base)), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_a_tensor_of_another_shape_is_refused(base: Path) -> None:
    edit_weights(base, lambda state: state.update({"model.norm.weight": torch.zeros(31)}))
    with pytest.raises(UserError, match="shapes of its weights"):
        load_model(ModelConfig(path=str(base)), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_a_cut_weight_file_is_named(base: Path) -> None:
    with open(base / "model.safetensors", "r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match="weight file of model.path=.*base is damaged"):
        load_model(ModelConfig(path=str(base)), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_pickled_weights_are_not_loaded(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin, a pickle"):
        load_model(ModelConfig(path=str(base)), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_a_folder_without_config_or_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(ModelConfig(path=str(tmp_path)), tiny_tokenizer(CHATML), seed=0, device=CPU)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load_model(ModelConfig(path=str(tmp_path)), tiny_tokenizer(CHATML), seed=0, device=CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no weights"):
        load_model(ModelConfig(path=str(tmp_path)), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_code_that_comes_with_a_model_is_not_run_unasked(base: Path) -> None:
    fields = json.loads((base / "config.json").read_text())
    fields |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (base / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="Python code of its own\n.*model.trust_remote_code=true"):
        load_model(ModelConfig(path=str(base)), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_embeddings_grow_to_cover_new_tokens_and_never_shrink(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    with caplog.at_level(logging.INFO, "rlhf"):
        model = load_model(ModelConfig(path=str(base), dtype=Dtype.fp32), tokenizer, seed=0, device=CPU)
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == known + 1
    assert model.config.vocab_size == known + 1
    assert f"from {known} to {known + 1} rows" in caplog.text
    written = load_file(base / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.lm_head.weight[:known], written)

    smaller = train_tokenizer(iter(["Two hens lay 12 eggs a day."]), 261)
    model = load_model(ModelConfig(path=str(base), dtype=Dtype.fp32), smaller, seed=0, device=CPU)
    assert model.get_input_embeddings().weight.shape[0] == known > len(smaller)


def test_a_config_file_with_a_wrong_value_is_named(base: Path) -> None:
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {"hidden_size": "wide"}))
    with pytest.raises(UserError, match="model.path=.*base cannot be loaded.*hidden_size"):
        load_model(ModelConfig(path=str(base)), tiny_tokenizer(CHATML), seed=0, device=CPU)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_start_as_the_base_model_and_only_they_train(dora: bool) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    ids = torch.arange(5, 15)[None]
    plain = packed_lm(load_model(config(), tokenizer, seed=0, device=CPU).eval())
    model = config(lora=LoraConfig(enabled=True, r=4, alpha=8, dora=dora))
    adapted = load_model(model, tokenizer, seed=0, device=CPU)
    assert adapted.training
    with torch.no_grad():
        torch.testing.assert_close(
            packed_lm(adapted.eval()).logits(ids), plain.logits(ids), rtol=1e-5, atol=1e-6
        )
    trained = [n for n, p in adapted.named_parameters() if p.requires_grad]
    # seven linear layers in each of two decoder layers, each with A and B (and a magnitude)
    assert len(trained) == 2 * 7 * (3 if dora else 2) and all("lora_" in n for n in trained)


def test_a_model_with_adapters_generates_under_plain_attention() -> None:
    model = load_model(
        config(lora=LoraConfig(enabled=True)), tiny_tokenizer(CHATML), seed=0, device=CPU
    ).eval()
    with plain_attention(model):
        output = model.generate(input_ids=torch.arange(5, 9)[None], max_new_tokens=3, do_sample=False)
    assert output[0, :4].tolist() == [5, 6, 7, 8] and output.shape[1] > 4
    assert model.get_base_model().config._attn_implementation == "packed"


def test_unknown_adapter_targets_name_the_modules_there_are() -> None:
    model = config(lora=LoraConfig(enabled=True, targets=["query"]))
    with pytest.raises(UserError, match=r"model.lora.targets=\['query'\].*\n.*q_proj"):
        load_model(model, tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_adapters_cannot_learn_tokens_the_base_does_not_know(base: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    model = ModelConfig(path=str(base), lora=LoraConfig(enabled=True))
    with pytest.raises(UserError, match="no embeddings for <turn>.*\n.*model.chat_template"):
        load_model(model, tokenizer, seed=0, device=CPU)


def test_four_bit_weights_say_that_bitsandbytes_is_missing(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = ModelConfig(path=str(base), lora=LoraConfig(enabled=True), quantize=Quantize.nf4)
    with pytest.raises(UserError, match="model.quantize=nf4 needs bitsandbytes"):
        load_model(model, tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_a_policy_of_recomputation_without_recomputation_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match="checkpointing_policy=selective recomputes nothing") as caught:
        config(checkpointing_policy=CheckpointingPolicy.selective).check("model.")
    assert caught.value.hint == "add model.gradient_checkpointing=true"


def test_selective_recomputation_repeats_no_product_and_no_attention() -> None:
    settings = config(gradient_checkpointing=True, checkpointing_policy=CheckpointingPolicy.selective)
    counts = []
    for given in (config(), settings, replace(settings, checkpointing_policy=CheckpointingPolicy.full)):
        network = load_model(given, tiny_tokenizer(CHATML), seed=0, device=CPU)
        ids = torch.arange(8)[None]
        bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
        arguments = packed_arguments(ids, positions_within(bounds, 8), bounds, 5)
        with FlopCounterMode(display=False) as counter:
            network.get_decoder()(**arguments).last_hidden_state.sum().backward()
        counts.append(counter.get_total_flops())
    without, selective, full = counts
    assert without == selective < full


def test_gradient_checkpointing_is_the_non_reentrant_one() -> None:
    model = load_model(config(gradient_checkpointing=True), tiny_tokenizer(CHATML), seed=0, device=CPU)
    layer = model.model.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}


@pytest.mark.parametrize("kind", ["gpt_neo", "nemotron"])
def test_a_config_that_its_own_code_chokes_on_names_the_family(kind: str) -> None:
    small = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    with pytest.raises(UserError, match=kind):
        load_model(config(config={"model_type": kind, **small}), tiny_tokenizer(CHATML), seed=0, device=CPU)
