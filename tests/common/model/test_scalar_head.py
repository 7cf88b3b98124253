from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from common.config import Dtype, LoraConfig, ModelConfig
from common.errors import UserError
from common.model.architecture import build_config
from common.model.loading import disable_dropout, load_model
from common.model.scalar_head import NEW_REWARD_MODEL, REWARD_MODEL, PackedScalarModel
from tests.packed import packed_scorer
from tests.tiny import CHATML, SHAPE, tiny_tokenizer

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 2},
}
DOCUMENTS = [torch.arange(5, 25), torch.tensor([7, 7, 9, 4]), torch.arange(60, 30, -1)]


def policy(folder: Path, **fields: Any) -> Path:
    """A saved causal LM without biases, as a policy's artifact has one."""
    torch.manual_seed(1)
    fields = {"model_type": "llama", "vocab_size": len(tiny_tokenizer()), **SHAPE, **fields}
    AutoModelForCausalLM.from_config(build_config(fields)).save_pretrained(folder)
    return folder


def loaded(path: Path, **changes: Any) -> PackedScalarModel:
    model = ModelConfig(**{"path": str(path), "dtype": Dtype.fp32, **changes})
    return packed_scorer(load_model(model, tiny_tokenizer(CHATML), NEW_REWARD_MODEL, seed=5, device=CPU))


@torch.no_grad()
def plain_scores(folder: Path) -> torch.Tensor:
    """What transformers says, one document after the other."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return torch.cat([model(document[None]).logits[0] for document in DOCUMENTS])


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_is_the_policys_and_only_the_head_is_new(tied: bool, tmp_path: Path) -> None:
    folder = policy(tmp_path / "policy", tie_word_embeddings=tied)
    given, state = load_file(folder / "model.safetensors"), loaded(folder).base().state_dict()
    assert set(state) == {name for name in given if name != "lm_head.weight"} | {"score.weight"}
    assert all(torch.equal(state[name], given[name]) for name in state if name != "score.weight")


def test_a_new_head_has_the_stated_spread_and_comes_from_the_seed_alone(tmp_path: Path) -> None:
    folder = policy(tmp_path / "policy", hidden_size=512)
    torch.manual_seed(0)
    first = loaded(folder).base().score.weight.detach()
    torch.manual_seed(1)
    assert torch.equal(first, loaded(folder).base().score.weight)
    assert first.shape == (1, 512) and float(first.mean()) == pytest.approx(0, abs=3 / 513)
    assert float(first.std()) == pytest.approx(513**-0.5, rel=0.1)
    config = ModelConfig(path=str(folder), dtype=Dtype.fp32)
    other = load_model(config, tiny_tokenizer(CHATML), NEW_REWARD_MODEL, seed=6, device=CPU)
    assert not torch.equal(first, other.score.weight)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_packed_scores_are_those_of_plain_transformers_on_each_document_alone(
    kind: str, tmp_path: Path
) -> None:
    packed = loaded(policy(tmp_path / "policy", **KINDS[kind]))
    packed.base().save_pretrained(tmp_path / "saved")
    scores = packed.eval().answers(DOCUMENTS)
    assert scores.dtype is torch.float32 and scores.std() > 0.01
    assert torch.allclose(scores, plain_scores(tmp_path / "saved"), atol=1e-6)


@torch.no_grad()
def test_a_score_is_read_where_asked_and_not_where_a_pad_or_eos_stands(tmp_path: Path) -> None:
    packed = loaded(policy(tmp_path / "policy"))
    pad, eos = 0, 2
    document = torch.tensor([9, eos, 11, pad, 13, eos])
    (last,) = packed.answers([document])
    (before,) = packed.answers([document[:4]])  # ends with what is the pad
    boundaries = torch.tensor([0, 6], dtype=torch.int32)
    positions = torch.arange(6)[None]
    both = packed(document[None], positions, boundaries, 6, torch.tensor([5, 3]))
    assert both.tolist() == pytest.approx([float(last), float(before)], abs=1e-6)
    assert abs(float(last - before)) > 1e-3


def test_half_precision_weights_give_scores_multiplied_in_fp32(tmp_path: Path) -> None:
    packed = loaded(policy(tmp_path / "policy"), dtype=Dtype.bf16)
    hidden = torch.randn(3, 32, dtype=torch.bfloat16)
    weight = packed.base().score.weight
    assert weight.dtype is torch.bfloat16
    assert torch.equal(packed.base().score(hidden)[:, 0], (hidden.float() @ weight.float().t())[:, 0])


def test_no_positions_give_no_scores_and_still_a_gradient_of_zero(tmp_path: Path) -> None:
    packed = loaded(policy(tmp_path / "policy"))
    boundaries = torch.tensor([0, 1], dtype=torch.int32)
    one = torch.zeros(1, 1, dtype=torch.int64)
    scores = packed(one, one, boundaries, 1, torch.zeros(0, dtype=torch.int64))
    assert scores.shape == (0,)
    scores.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in packed.parameters())


def test_adapters_train_the_head_as_well_and_begin_at_the_same_scores(tmp_path: Path) -> None:
    folder = policy(tmp_path / "policy")
    lora = LoraConfig(enabled=True, r=4, alpha=8, dropout=0.5)
    adapted = loaded(folder, lora=lora)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {
        "model.base_model.model.score.modules_to_save.default.weight"
    }
    assert not any("score.lora" in name for name in trained) and len(trained) == 2 * 7 * 2 + 1
    assert torch.equal(adapted.eval().answers(DOCUMENTS), loaded(folder).eval().answers(DOCUMENTS))


def test_the_models_own_dropout_is_off_and_the_adapters_is_not(tmp_path: Path) -> None:
    folder = policy(tmp_path / "policy", attention_dropout=0.5)
    packed = loaded(folder)
    assert packed.training
    assert torch.equal(packed.answers(DOCUMENTS), packed.answers(DOCUMENTS))
    assert packed.base().config.attention_dropout == 0.5  # the artifact's config says what the policy's did
    adapted = loaded(folder, lora=LoraConfig(enabled=True, r=4, alpha=8, dropout=0.5))
    assert {m.p for m in adapted.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    disable_dropout(adapted)
    assert {m.p for m in adapted.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    gpt2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    network = AutoModelForCausalLM.from_config(build_config({"model_type": "gpt2", **gpt2}))
    disable_dropout(network)
    assert {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_the_config_says_one_label_and_a_pad_that_ends_no_turn(tmp_path: Path) -> None:
    config = loaded(policy(tmp_path / "policy")).base().config
    assert (config.num_labels, config.pad_token_id, config.eos_token_id) == (1, 0, 2)


def test_recomputing_activations_changes_no_gradient(tmp_path: Path) -> None:
    folder, gradients = policy(tmp_path / "policy"), []
    for checkpointing in (False, True):
        packed = loaded(folder, gradient_checkpointing=checkpointing)
        packed.answers(DOCUMENTS).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in packed.named_parameters()})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_an_architecture_without_a_sequence_classifier_is_named(tmp_path: Path) -> None:
    folder = policy(tmp_path / "policy", model_type="cohere")
    with pytest.raises(UserError, match="cohere does not make a reward model: .* no SequenceClassification"):
        loaded(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.norm.weight", "lacks 1 of the model's tensors: model.norm.weight"),
        (None, "no place for: other"),
    ],
)
def test_nothing_but_the_heads_may_differ_from_the_policys_tensors(
    name: str | None, message: str, tmp_path: Path
) -> None:
    folder = policy(tmp_path / "policy")
    edit(folder, lambda state: state.pop(name) if name else state.update(other=torch.zeros(1)))
    with pytest.raises(UserError, match=message):
        loaded(folder)


# --- Reward models ----------------------------------------------------------------------------------


def reward_model(folder: Path) -> Path:
    loaded(policy(folder.with_name("policy"))).base().save_pretrained(folder)
    return folder


def edit(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def reloaded(folder: Path) -> PackedScalarModel:
    model = ModelConfig(path=str(folder), dtype=Dtype.fp32)
    return packed_scorer(load_model(model, tiny_tokenizer(CHATML), REWARD_MODEL, seed=9, device=CPU))


def test_a_saved_reward_model_is_loaded_with_its_own_head(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "reward")
    found = reloaded(folder).eval()
    assert torch.equal(found.base().score.weight, load_file(folder / "model.safetensors")["score.weight"])
    assert torch.allclose(found.answers(DOCUMENTS), plain_scores(folder), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("score.weight"), "lacks 1 of the model's tensors: score.weight"),
        (lambda state: state["score.weight"].zero_(), "score.weight is all zeros"),
        (lambda state: state["score.weight"][0, :1].fill_(float("nan")), "score.weight is not finite"),
        (lambda state: state.update({"score.weight": torch.zeros(0, 32)}), "shapes of its weights"),
        (lambda state: state.update({"score.weight": torch.ones(2, 32)}), "shapes of its weights"),
    ],
    ids=["missing", "zeros", "nan", "empty", "two labels"],
)
def test_a_reward_model_without_a_usable_head_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "reward")
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        reloaded(folder)


def test_a_classifier_with_two_labels_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=len(tiny_tokenizer()), num_labels=2, pad_token_id=0, **SHAPE)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="has 2 labels, where a reward model has one"):
        reloaded(tmp_path / "two")


def test_a_policy_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lacks 1 of the model's tensors: score.weight"):
        reloaded(policy(tmp_path / "policy"))
