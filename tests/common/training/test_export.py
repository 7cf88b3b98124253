from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from common.artifacts import Artifact, read_manifest, verify
from common.config import Dtype, LoraConfig, ModelConfig
from common.errors import UserError
from common.model import adapters
from common.model.loading import load_model
from common.model.packed import PackedCausalLM
from common.model.scalar_head import PackedScalarModel, load_scalar_model
from common.stage import Role
from common.training import export
from common.training.export import (
    ExportMismatch,
    export_policy,
    export_reward_model,
    largest_difference,
    noise_of,
)
from tests.field_templates import CALLS_END_APART
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
PROBE = torch.arange(5, 25)[None]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 4},
    "cohere": {"model_type": "cohere", "logit_scale": 0.25},
}


def trained(
    fields: Mapping[str, Any], dtype: Dtype = Dtype.fp32, lora: LoraConfig | None = None
) -> PackedCausalLM:
    """A model whose trainable weights have moved away from where they began."""
    config = ModelConfig(config={**SHAPE, **fields}, dtype=dtype, lora=lora or LoraConfig())
    model = load_model(config, tiny_tokenizer(CHATML), seed=0, device=CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    return PackedCausalLM(model.eval())


@torch.no_grad()
def exported(packed: PackedCausalLM, folder: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"details": {"steps": 7}, "probe": PROBE, "live_logits": packed.logits(PROBE)}
    return export_policy(
        packed.model, packed.state_dict(), tiny_tokenizer(CHATML), folder, **{**arguments, **changes}
    )


@torch.no_grad()
def reloaded_logits(folder: Path) -> torch.Tensor:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.config._attn_implementation == "sdpa"
    return model(PROBE).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_gives_the_live_models_logits(kind: str, tmp_path: Path) -> None:
    packed = trained(KINDS[kind])
    folder = exported(packed, tmp_path / "export")
    assert largest_difference(packed.logits(PROBE), reloaded_logits(folder)) <= 1e-6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_adapters_give_the_live_models_logits_and_leave_it_untouched(
    dora: bool, tied: bool, tmp_path: Path
) -> None:
    lora = LoraConfig(enabled=True, r=4, alpha=8, dora=dora)
    packed = trained({"model_type": "llama", "tie_word_embeddings": tied}, lora=lora)
    untrained = load_model(
        ModelConfig(config={**SHAPE, "model_type": "llama", "tie_word_embeddings": tied}, dtype=Dtype.fp32),
        tiny_tokenizer(CHATML),
        seed=0,
        device=CPU,
    )
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    live = packed.logits(PROBE)
    assert largest_difference(live, PackedCausalLM(untrained.eval()).logits(PROBE)) > 1e-2
    folder = exported(packed, tmp_path / "export")
    assert largest_difference(live, reloaded_logits(folder)) <= 1e-6
    assert torch.equal(packed.logits(PROBE), live)
    after = packed.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    adapters = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * (3 if dora else 2)
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))


MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2},
}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TIED = {"model_type": "llama", "tie_word_embeddings": True}


def adapter_around_its_base(folder: Path, fields: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the untrained base with the artifact's adapter/ around it, as peft loads it."""
    config = ModelConfig(config={**SHAPE, **fields}, dtype=Dtype.fp32)
    base = load_model(config, tiny_tokenizer(CHATML), seed=0, device=CPU)
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter")
    return PackedCausalLM(adapted.eval()).logits(PROBE)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen3_moe", ["all-linear"]),
        ("qwen3_moe", SEVEN),
        ("mixtral", ["all-linear"]),
        ("mixtral", SEVEN),
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("granitemoe", ["q_proj", "experts.down_proj"]),
    ],
)
def test_adapters_of_experts_are_merged_into_the_tensor_that_holds_them(
    kind: str, targets: list[str], tmp_path: Path
) -> None:
    lora = LoraConfig(enabled=True, r=4, alpha=8, targets=targets)
    packed = trained(MIXTURES[kind], lora=lora)
    folder = exported(packed, tmp_path / "export")
    assert largest_difference(packed.logits(PROBE), reloaded_logits(folder)) <= 1e-6
    assert torch.equal(adapter_around_its_base(folder, MIXTURES[kind]), packed.logits(PROBE))
    experts = [name for name, _ in packed.named_parameters() if "experts" in name and "lora_B" in name]
    assert len(experts) == 2 * (1 if targets[-1] == "experts.down_proj" else 2)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_a_tied_head_with_an_adapter_on_either_side_is_two_tensors_in_the_artifact(
    targets: list[str], dora: bool, tmp_path: Path
) -> None:
    packed = trained(TIED, lora=LoraConfig(enabled=True, r=4, alpha=8, targets=targets, dora=dora))
    folder = exported(packed, tmp_path / "export")
    assert largest_difference(packed.logits(PROBE), reloaded_logits(folder)) <= 1e-6
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    written = load_file(folder / "model.safetensors")
    assert not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert torch.equal(adapter_around_its_base(folder, TIED), packed.logits(PROBE))


def test_adapters_elsewhere_leave_a_tied_head_tied(tmp_path: Path) -> None:
    folder = exported(trained(TIED, lora=LoraConfig(enabled=True, r=4, alpha=8)), tmp_path / "export")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


# --- What is right in bf16, and what is wrong in any dtype ------------------------------------------

BF16_LORA = {"dtype": Dtype.bf16, "lora": LoraConfig(enabled=True, r=4, alpha=8)}


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"], **BF16_LORA)
    folder = exported(packed, tmp_path / "export")
    layer = packed.base().model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    exact = layer.base_layer.weight.float() + 2.0 * (b @ a)
    written = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(written, exact.to(torch.bfloat16))
    twice = layer.base_layer.weight + (2.0 * (b @ a)).to(torch.bfloat16)
    assert not torch.equal(written, twice)


def test_rounding_that_sends_a_token_to_another_expert_is_no_wrong_export(tmp_path: Path) -> None:
    lora = LoraConfig(enabled=True, r=4, alpha=8, targets=SEVEN)
    packed = trained(MIXTURES["qwen3_moe"], Dtype.bf16, lora)
    details = read_manifest(exported(packed, tmp_path / "export")).details
    assert details["largest_logit_difference"] > 0.05  # one position, and the limit that there once was
    assert details["typical_logit_difference"] < 0.01 and details["mean_kl"] < 1e-4
    assert details["largest_merge_difference"] < 1e-6 and details["largest_logit_difference_fp32"] < 1e-5


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_a_merge_with_a_slightly_wrong_scale_is_found_and_kept_under_another_name(
    dtype: Dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = trained(KINDS["llama"], dtype, BF16_LORA["lora"])
    merged = adapters._merged

    def wrong(layer: Any) -> torch.Tensor:
        base = layer.base_layer.weight
        return base + 1.01 * (merged(layer) - base)

    monkeypatch.setattr(adapters, "_merged", wrong)
    with pytest.raises(ExportMismatch, match=r"q_proj.weight is not the merge of its adapter") as error:
        exported(packed, tmp_path / "export")
    kept = tmp_path / "export.unverified"
    assert error.value.EXIT_CODE == 2 and str(kept) in error.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["export.unverified"]
    assert "not the merge" in verify(kept).details["unverified"]
    with pytest.raises(UserError, match="not the merge"):
        Artifact.load(kept, Role.policy)


@pytest.mark.parametrize("lora", [LoraConfig(), BF16_LORA["lora"]])
def test_weights_that_changed_places_are_found_in_bf16(lora: LoraConfig, tmp_path: Path) -> None:
    packed = trained(KINDS["llama"], Dtype.bf16, lora)
    state = dict(packed.state_dict())
    (one,) = [n for n in state if "layers.0.mlp.gate_proj" in n and ("lora_B" in n or not lora.enabled)]
    other = one.replace("gate_proj", "up_proj")
    state[one], state[other] = state[other], state[one]
    live = packed.logits(PROBE).detach()
    with pytest.raises(ExportMismatch, match="differ from the live model's typically"):
        export_policy(
            packed.model, state, tiny_tokenizer(CHATML), tmp_path / "export",
            details={}, probe=PROBE, live_logits=live,
        )  # fmt: skip


@pytest.mark.parametrize("lora", [LoraConfig(), BF16_LORA["lora"]])
def test_a_config_that_is_slightly_wrong_is_found_in_bf16(
    lora: LoraConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = trained(KINDS["llama"], Dtype.bf16, lora)
    right = export.plain_config

    def wrong(model: PreTrainedModel) -> Any:
        config = right(model)
        config.rms_norm_eps *= 1.5
        return config

    monkeypatch.setattr(export, "plain_config", wrong)
    with pytest.raises(ExportMismatch, match="in fp32"):
        exported(packed, tmp_path / "export")


def test_an_export_that_there_is_no_memory_to_compare_in_fp32_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_free_memory", lambda: 1000)
    said: list[str] = []
    folder = exported(trained(KINDS["llama"], Dtype.bf16), tmp_path / "export", say=said.append)
    assert said == ["note: the export was not compared in fp32, which takes more memory than there is"]
    assert read_manifest(folder).details["largest_logit_difference_fp32"] is None


def test_noise_is_that_of_the_live_models_two_kernels_and_none_is_needed_in_fp32() -> None:
    packed = trained({**KINDS["llama"], "hidden_size": 64, "head_dim": 32}, Dtype.bf16)
    live = packed.logits(PROBE).detach()
    assert 1e-5 < noise_of(packed, [PROBE[0]], live) < 1e-1
    assert torch.equal(packed.logits(PROBE), live)
    fp32 = trained(KINDS["llama"])
    assert noise_of(fp32, [PROBE[0]], fp32.logits(PROBE)) == 0.0


def test_bf16_weights_are_written_bit_for_bit(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"], Dtype.bf16)
    folder = exported(packed, tmp_path / "export")
    written = load_file(folder / "model.safetensors")
    live = packed.model.state_dict()
    assert set(written) == set(live)
    assert all(
        tensor.dtype is torch.bfloat16 and torch.equal(tensor, live[n]) for n, tensor in written.items()
    )
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_names_may_be_the_wrappers_or_the_models_own_or_taken_from_the_module(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    live = packed.logits(PROBE).detach()
    files = []
    for name, state in (("a", packed.state_dict()), ("b", packed.model.state_dict()), ("c", None)):
        folder = export_policy(
            packed.model,
            state,
            tiny_tokenizer(CHATML),
            tmp_path / name,
            details={},
            probe=PROBE,
            live_logits=live,
        )
        files.append(read_manifest(folder).files)
    assert files[0] == files[1] == files[2]


def test_the_artifact_has_exactly_the_files_that_plain_transformers_needs(tmp_path: Path) -> None:
    folder = exported(trained(KINDS["tied"]), tmp_path / "export")
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "packed" not in (folder / "config.json").read_text()
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([2, 4], 0)
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_the_manifest_says_what_the_next_step_must_know(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    folder = exported(packed, tmp_path / "export")
    artifact = Artifact.load(folder, Role.policy)
    details = artifact.manifest.details
    assert details["steps"] == 7
    assert (details["bos_token_id"], details["eos_token_id"], details["pad_token_id"]) == (1, 2, 0)
    assert details["terminators"] == [4]
    assert (details["dtype"], details["context_length"], details["model_type"]) == ("float32", 64, "llama")
    assert details["parameters"] == sum(p.numel() for p in packed.model.parameters())
    assert details["largest_logit_difference"] <= 1e-6
    assert details["packages"]["transformers"]


def test_generation_stops_at_the_end_of_a_call_too_where_that_is_another_token(tmp_path: Path) -> None:
    packed = trained(KINDS["tied"])
    with torch.no_grad():
        folder = export_policy(
            packed.model, packed.state_dict(), tiny_tokenizer(CALLS_END_APART), tmp_path / "export",
            details={}, probe=PROBE, live_logits=packed.logits(PROBE),
        )  # fmt: skip
    # eos, and the ends of an answer and of a call
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tiny_tokenizer().convert_ids_to_tokens(ends) == ["</s>", "<|im_end|>", "<|eot_id|>"]
    assert read_manifest(folder).details["terminators"] == [4, 7]


def test_generation_of_the_artifact_goes_on_as_the_live_model_would(tmp_path: Path) -> None:
    folder = exported(trained(KINDS["llama"]), tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = model.generate(PROBE, max_new_tokens=3, do_sample=False)
    assert output.shape[1] <= PROBE.shape[1] + 3 and torch.equal(output[:, : PROBE.shape[1]], PROBE)


def test_logits_that_differ_keep_the_artifact_from_being_committed(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    wrong = packed.logits(PROBE).detach() * 1.001
    with pytest.raises(ExportMismatch, match="differ from the live model's by 0.000999"):
        exported(packed, tmp_path / "export", live_logits=wrong)
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / "export.tmp" / "manifest.json").exists()


def test_weights_that_are_not_the_live_ones_keep_the_artifact_from_being_committed(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state["model.model.layers.0.mlp.up_proj.weight"].zero_()
    live = packed.logits(PROBE).detach()
    with pytest.raises(ExportMismatch):
        export_policy(
            packed.model,
            state,
            tiny_tokenizer(CHATML),
            tmp_path / "export",
            details={},
            probe=PROBE,
            live_logits=live,
        )
    assert not (tmp_path / "export").exists()


def test_an_incomplete_state_dict_is_named(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    state = packed.state_dict()
    del state["model.model.norm.weight"]
    with pytest.raises(ValueError, match="lacks 1 of the module's tensors.*model.norm.weight"):
        export_policy(
            packed.model,
            state,
            tiny_tokenizer(CHATML),
            tmp_path / "export",
            details={},
            probe=PROBE,
            live_logits=torch.zeros(1),
        )


def test_the_same_artifact_is_left_where_it_is(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    folder = exported(packed, tmp_path / "export")
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    exported(packed, tmp_path / "export", details={"steps": 8})
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_another_artifact_is_set_aside_whole(tmp_path: Path) -> None:
    old = exported(trained(KINDS["llama"]), tmp_path / "export")
    files = read_manifest(old).files
    exported(trained(KINDS["tied"]), tmp_path / "export")
    assert verify(tmp_path / "export.old-1").files == files
    assert verify(tmp_path / "export").files != files


def test_a_damaged_artifact_is_replaced_and_kept_for_inspection(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    folder = exported(packed, tmp_path / "export")
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    exported(packed, tmp_path / "export")
    verify(tmp_path / "export")
    with pytest.raises(UserError, match="content differs"):
        verify(tmp_path / "export.old-1")


def test_a_half_written_export_of_a_killed_run_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "export.tmp").mkdir()
    (tmp_path / "export.tmp" / "stray.json").write_text("{}")
    folder = exported(trained(KINDS["llama"]), tmp_path / "export")
    assert not (folder / "stray.json").exists() and verify(folder)


def test_a_full_disk_is_a_user_error_and_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: IoError(No space left on device (os error 28))")

    assert errno.ENOSPC == 28
    monkeypatch.setattr(export, "_save", full)
    with pytest.raises(UserError, match="the disk is full"):
        exported(trained(KINDS["llama"]), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_sampling_settings_of_the_base_model_do_not_prevent_saving(tmp_path: Path) -> None:
    packed = trained(KINDS["llama"])
    packed.model.generation_config.temperature = 0.6
    folder = exported(packed, tmp_path / "export")
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["temperature"] == 0.6 and settings["do_sample"] is True


# --- Reward models ----------------------------------------------------------------------------------

END = 4  # <|im_end|>
DOCUMENTS = [torch.tensor([*range(5, 25), END]), torch.tensor([7, 7, 9, END]), torch.tensor([60, 2, 61, END])]


def trained_scorer(
    folder: Path, dtype: Dtype = Dtype.fp32, lora: LoraConfig | None = None, **fields: Any
) -> PackedScalarModel:
    """A reward model above a policy that was exported, its trainable weights moved away from there."""
    policy = exported(trained({"model_type": "llama", **fields}, dtype), folder)
    config = ModelConfig(path=str(policy), dtype=dtype, lora=lora or LoraConfig())
    model = load_scalar_model(config, tiny_tokenizer(CHATML), seed=0, device=CPU)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    return PackedScalarModel(model.eval())


@torch.no_grad()
def exported_scorer(packed: PackedScalarModel, folder: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"details": {"calibration": {"mean": 0.5, "std": 2.0}}, "probe": DOCUMENTS}
    arguments["live_scores"] = packed.scores(DOCUMENTS)
    return export_reward_model(
        packed.model, packed.state_dict(), tiny_tokenizer(CHATML), folder, **{**arguments, **changes}
    )


@torch.no_grad()
def batched_scores(folder: Path, side: str) -> torch.Tensor:
    """All documents in one batch of plain transformers, padded as the artifact's tokenizer says."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    batch = tokenizer.pad({"input_ids": [d.tolist() for d in DOCUMENTS]}, return_tensors="pt")
    return model(**batch).logits[:, 0].float()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_transformers_scores_a_padded_batch_as_the_live_model_does(
    tied: bool, side: str, tmp_path: Path
) -> None:
    packed = trained_scorer(tmp_path / "policy", tie_word_embeddings=tied)
    folder = exported_scorer(packed, tmp_path / "export")
    scores = batched_scores(folder, side)
    assert torch.allclose(scores, packed.scores(DOCUMENTS), atol=1e-5) and scores.std() > 0.01
    assert Artifact.load(folder, Role.reward_model).manifest.details["largest_score_difference"] <= 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_merged_and_the_trained_head_taken_along(dora: bool, tmp_path: Path) -> None:
    packed = trained_scorer(tmp_path / "policy", lora=LoraConfig(enabled=True, r=4, alpha=8, dora=dora))
    head = packed.base().score
    assert not torch.equal(head.original_module.weight, head.modules_to_save["default"].weight)
    before = packed.scores(DOCUMENTS).detach()
    folder = exported_scorer(packed, tmp_path / "export")
    assert torch.allclose(batched_scores(folder, "right"), before, atol=1e-5)
    written = load_file(folder / "model.safetensors")
    assert torch.equal(written["score.weight"], head.modules_to_save["default"].weight)
    assert not any("lora" in name or "modules_to_save" in name for name in written)
    assert "base_model.model.score.weight" in load_file(folder / "adapter" / "adapter_model.safetensors")
    assert torch.equal(packed.scores(DOCUMENTS), before)


def test_a_reward_models_artifact_is_a_classifier_with_one_label_and_no_generation(tmp_path: Path) -> None:
    folder = exported_scorer(trained_scorer(tmp_path / "policy"), tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 1 and config["pad_token_id"] == 0 and config["use_cache"] is True
    assert not (folder / "generation_config.json").exists()
    details = Artifact.load(folder, Role.reward_model).manifest.details
    assert details["calibration"] == {"mean": 0.5, "std": 2.0}
    assert (details["pad_token_id"], details["terminators"]) == (0, [END])
    with pytest.raises(UserError, match="reward_model, where a policy is needed"):
        Artifact.load(folder, Role.policy)


def test_bf16_heads_are_written_bit_for_bit(tmp_path: Path) -> None:
    packed = trained_scorer(tmp_path / "policy", Dtype.bf16)
    folder = exported_scorer(packed, tmp_path / "export")
    head = load_file(folder / "model.safetensors")["score.weight"]
    assert head.dtype is torch.bfloat16 and torch.equal(head, packed.base().score.weight)


def test_scores_that_differ_keep_the_reward_model_from_being_committed(tmp_path: Path) -> None:
    packed = trained_scorer(tmp_path / "policy")
    wrong = packed.scores(DOCUMENTS).detach() + 1e-3
    with pytest.raises(ExportMismatch, match="reloaded scores differ"):
        exported_scorer(packed, tmp_path / "export", live_scores=wrong)
    assert not (tmp_path / "export").exists()


def test_a_pad_that_ends_turns_is_refused(tmp_path: Path) -> None:
    packed = trained_scorer(tmp_path / "policy")
    packed.base().config.pad_token_id = END
    with pytest.raises(ValueError, match="plain transformers would score another token"):
        exported_scorer(packed, tmp_path / "export")
