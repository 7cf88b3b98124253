from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from common import notices
from common.config import Dtype, LoraConfig, ModelConfig, Quantize, TokenizerConfig
from common.errors import UserError
from common.model.attention import plain_attention
from common.model.losses import PackedCausalLM
from common.model.models import (
    build_config,
    load_model,
    load_tokenizer,
    read_template,
    terminators_of,
    train_tokenizer,
)
from tests.tiny import CHATML, tiny_tokenizer

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TEXTS = ["Two hens lay 12 eggs a day.", "Twelve hens lay 72 eggs a day.", "How many eggs do 3 hens lay?"] * 9


def config(**changes: object) -> ModelConfig:
    fields = {"config": {"model_type": "llama", **SHAPE}, "dtype": Dtype.fp32, **changes}
    return ModelConfig(**fields)


def saved_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


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


# --- Tokenizer ------------------------------------------------------------------------------------


def test_a_trained_tokenizer_has_one_token_per_marker_and_digit() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 280)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == [
        "<pad>",
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    ids = tokenizer("<|im_start|>72<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "7", "2", "<|im_end|>"]
    assert len(tokenizer) == 280
    assert tokenizer.decode(tokenizer("é 12\n\tü")["input_ids"]) == "é 12\n\tü"


def test_a_trained_tokenizer_ends_turns_with_im_end() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 300)
    assert terminators_of(tokenizer) == (4,)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"


def test_the_same_texts_give_the_same_tokenizer_and_a_kept_one_is_not_trained_again(tmp_path: Path) -> None:
    first, second = train_tokenizer(iter(TEXTS), 300), train_tokenizer(iter(TEXTS), 300)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    model = config(tokenizer=TokenizerConfig(train_vocab_size=300))
    asked = []

    def texts() -> Iterator[str]:
        asked.append(1)
        return iter(TEXTS)

    made = load_tokenizer(model, texts, tmp_path / "tokenizer")
    kept = load_tokenizer(model, texts, tmp_path / "tokenizer")
    assert asked == [1]
    assert kept.get_vocab() == made.get_vocab() == first.get_vocab()
    assert kept.chat_template == first.chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_of_two_nodes_that_train_the_tokenizer_the_first_one_wins(tmp_path: Path) -> None:
    model = config(tokenizer=TokenizerConfig(train_vocab_size=280))
    kept = tmp_path / "tokenizer"

    def texts_while_another_node_finishes() -> Iterator[str]:
        train_tokenizer(iter(TEXTS), 270).save_pretrained(kept)
        return iter(TEXTS)

    assert len(load_tokenizer(model, texts_while_another_node_finishes, kept)) == 270
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer"]


def test_too_small_a_vocabulary_is_refused_with_the_smallest_one() -> None:
    with pytest.raises(UserError, match="train_vocab_size=100.*\n.*261 or more"):
        train_tokenizer(iter(TEXTS), 100)


def test_a_config_without_a_tokenizer_names_both_ways_out() -> None:
    with pytest.raises(UserError, match="model.tokenizer.path.*model.tokenizer.train_vocab_size"):
        load_tokenizer(config())


@pytest.mark.parametrize("pad", [None, "</s>", "<|im_end|>"])
def test_a_pad_that_would_hide_a_terminator_is_replaced_by_a_spare_token(
    tmp_path: Path, pad: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.pad_token = pad
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    with caplog.at_level(logging.INFO, "rlhf"):
        loaded = load_tokenizer(config(tokenizer=TokenizerConfig(path=str(path))))
    assert (loaded.pad_token, loaded.pad_token_id, len(loaded)) == ("<pad>", 0, len(tokenizer))
    assert "pad is <pad>" in caplog.text


def test_without_a_spare_token_pad_is_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[END]": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="[END]", pad_token="[END]")
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    with caplog.at_level(logging.INFO, "rlhf"):
        loaded = load_tokenizer(config(tokenizer=TokenizerConfig(path=str(path))))
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (3, 2, 4)
    assert "<pad> is added" in caplog.text


def test_a_good_pad_is_left_alone(tmp_path: Path) -> None:
    path = saved_tokenizer(tmp_path / "t", tiny_tokenizer(CHATML))
    loaded = load_tokenizer(config(tokenizer=TokenizerConfig(path=str(path))))
    assert loaded.pad_token_id == 0 and loaded.get_vocab() == tiny_tokenizer().get_vocab()


def test_a_missing_eos_is_what_the_chat_template_ends_turns_with(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.eos_token = None
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    loaded = load_tokenizer(config(tokenizer=TokenizerConfig(path=str(path))))
    assert loaded.eos_token == "<|im_end|>"


def test_no_eos_and_no_template_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    with pytest.raises(UserError, match="no eos token.*\n.*model.chat_template=chatml"):
        load_tokenizer(config(tokenizer=TokenizerConfig(path=str(path))))


def test_a_named_template_is_set_and_brings_its_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"a": 0, "<pad>": 1, "</s>": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", pad_token="<pad>")
    path = saved_tokenizer(tmp_path / "t", tokenizer)
    model = config(tokenizer=TokenizerConfig(path=str(path)), chat_template="chatml")
    loaded = load_tokenizer(model)
    assert loaded.chat_template == read_template("chatml")
    assert loaded.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [3, 4]


@pytest.mark.parametrize("name", ["chatml", "alpaca", "plain"])
def test_every_named_template_is_shipped(name: str) -> None:
    assert "messages" in read_template(name)


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(UserError, match="model.chat_template=chatmll.*\n.*did you mean chatml"):
        read_template("chatmll")


def test_a_template_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(CHATML)
    assert read_template(str(path)) == CHATML


# --- Random initialisation ------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "lama"}, "model.config.model_type=lama is unknown\n.*did you mean llama"),
        ({"model_type": "llama", "hiden_size": 8}, "model.config.hiden_size.*\n.*did you mean hidden_size"),
        ({"model_type": "llama", "hidden_size": "wide"}, "model.config of llama is not valid.*hidden_size"),
        (
            {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4},
            "not valid.*not a multiple",
        ),
        ({}, "model.config.model_type=None is unknown"),
    ],
)
def test_a_wrong_config_names_the_field(fields: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        build_config(fields)


def test_a_config_that_is_no_decoder_is_refused() -> None:
    model = config(config={"model_type": "vit"})
    with pytest.raises(UserError, match=r"model.config.\w+ is not a field|does not make a causal LM"):
        load_model(model, tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused() -> None:
    model = config(config={"model_type": "llama", **SHAPE, "vocab_size": 100})
    with pytest.raises(UserError, match="model.config.vocab_size=100"):
        load_model(model, tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_rows_longer_than_the_context_are_refused_before_training() -> None:
    tokenizer = tiny_tokenizer(CHATML)
    load_model(config(), tokenizer, seed=0, device=CPU, max_length=64)
    with pytest.raises(UserError, match="data.max_length=65.*context of 64 tokens"):
        load_model(config(), tokenizer, seed=0, device=CPU, max_length=65)


# --- Weights --------------------------------------------------------------------------------------


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


def test_a_missing_folder_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.path=.*nowhere does not exist"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "nowhere")))


def test_a_hub_name_without_a_network_names_it_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="model.path=someone/something is not a local folder.*hub") as caught:
        load_tokenizer(ModelConfig(path="someone/something"))
    assert "name the folder" in str(caught.value.hint)


def test_whether_the_hub_answers_is_known_without_its_clients_retries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import socket

    import huggingface_hub.constants

    from common.model import models

    monkeypatch.setattr(models.urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        assert models._hub_answers()
    assert not models._hub_answers()


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

    smaller = train_tokenizer(iter(TEXTS), 261)
    model = load_model(ModelConfig(path=str(base), dtype=Dtype.fp32), smaller, seed=0, device=CPU)
    assert model.get_input_embeddings().weight.shape[0] == known > len(smaller)


def test_a_config_file_with_a_wrong_value_is_named(base: Path) -> None:
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | {"hidden_size": "wide"}))
    with pytest.raises(UserError, match="model.path=.*base cannot be loaded.*hidden_size"):
        load_model(ModelConfig(path=str(base)), tiny_tokenizer(CHATML), seed=0, device=CPU)


# --- Adapters and options -------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_start_as_the_base_model_and_only_they_train(dora: bool) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    ids = torch.arange(5, 15)[None]
    plain = PackedCausalLM(load_model(config(), tokenizer, seed=0, device=CPU).eval())
    model = config(lora=LoraConfig(enabled=True, r=4, alpha=8, dora=dora))
    adapted = load_model(model, tokenizer, seed=0, device=CPU)
    assert adapted.training
    with torch.no_grad():
        torch.testing.assert_close(
            PackedCausalLM(adapted.eval()).logits(ids), plain.logits(ids), rtol=1e-5, atol=1e-6
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


def test_four_bit_weights_need_a_gpu(base: Path) -> None:
    model = ModelConfig(path=str(base), lora=LoraConfig(enabled=True), quantize=Quantize.nf4)
    with pytest.raises(UserError, match="model.quantize=nf4 needs a CUDA GPU"):
        load_model(model, tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_gradient_checkpointing_is_the_non_reentrant_one() -> None:
    model = load_model(config(gradient_checkpointing=True), tiny_tokenizer(CHATML), seed=0, device=CPU)
    layer = model.model.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("bert", "attention to later tokens"),
        ("bart", "an encoder and a decoder"),
        ("whisper", "an encoder and a decoder"),
        ("gemma4_unified_assistant", "the keys and values of another model"),
    ],
)
def test_what_is_no_decoder_is_refused_by_its_name_before_it_is_made(kind: str, what: str) -> None:
    with pytest.raises(UserError, match=f"model_type={kind} has {what}.*\n.*Llama"):
        load_model(config(config={"model_type": kind}), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_a_type_whose_own_defaults_are_not_valid_is_an_error_that_names_it() -> None:
    with pytest.raises(UserError, match="model.config of gemma4_assistant is not valid: .*per_layer_input"):
        build_config({"model_type": "gemma4_assistant"})
    with pytest.raises(UserError, match="model.config.hidden_sise is not a field.*\n.*hidden_size"):
        build_config({"model_type": "gemma4_assistant", "hidden_sise": 8})


@pytest.mark.parametrize("kind", ["gpt_neo", "nemotron"])
def test_a_config_that_its_own_code_chokes_on_names_the_family(kind: str) -> None:
    small = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    with pytest.raises(UserError, match=kind):
        load_model(config(config={"model_type": kind, **small}), tiny_tokenizer(CHATML), seed=0, device=CPU)


def test_a_mixture_says_that_its_router_loss_is_not_computed() -> None:
    mixture = {"model_type": "mixtral", **SHAPE, "num_local_experts": 2, "router_aux_loss_coef": 0.02}
    said: list[str] = []
    notices.listen(said.append)
    for fields in (mixture, mixture, config().config):
        load_model(config(config=fields), tiny_tokenizer(CHATML), seed=0, device=CPU)
    (line,) = [line for line in said if "routers" in line]
    assert "router_aux_loss_coef=0.02) is not computed" in line and "model_type=mixtral" in line


def test_a_config_that_asks_for_the_router_loss_is_refused() -> None:
    with pytest.raises(
        UserError, match="model.config.output_router_logits=true.*not computed\n.*leave it out"
    ):
        build_config({"model_type": "mixtral", "output_router_logits": True})


def test_naming_no_model_is_an_error_with_both_ways_out() -> None:
    with pytest.raises(UserError, match="no model is named\n.*model.path.*model.config.model_type"):
        load_model(ModelConfig(), tiny_tokenizer(CHATML), seed=0, device=CPU)
