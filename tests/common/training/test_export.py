"""An artifact has the files and the manifest that the next step needs, and is there whole or not at all."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common.artifacts import Artifact, read_manifest, verify
from common.config import Dtype, LoraConfig, ModelConfig
from common.errors import UserError
from common.model.loading import load_model
from common.model.scalar_head import NEW_REWARD_MODEL, PackedScalarModel
from common.stage import Role
from common.training import export
from common.training.export import ExportMismatch, ask_live, export_model
from tests.common.training.exporting import (
    CPU,
    KINDS,
    PROBE,
    exported,
    trained,
)
from tests.field_templates import CALLS_END_APART
from tests.packed import packed_scorer
from tests.tiny import CHATML, tiny_tokenizer


def test_the_artifact_has_exactly_the_files_that_plain_transformers_needs(tmp_path: Path) -> None:
    folder = exported(trained(KINDS["tied"]), tmp_path / "export")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
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
    folder = export_model(
        packed.model, packed.state_dict(), tiny_tokenizer(CALLS_END_APART), tmp_path / "export",
        ask_live(packed, PROBE), details={},
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


END = 4  # <|im_end|>
DOCUMENTS = [torch.tensor([*range(5, 25), END]), torch.tensor([7, 7, 9, END]), torch.tensor([60, 2, 61, END])]


def trained_scorer(
    folder: Path, dtype: Dtype = Dtype.fp32, lora: LoraConfig | None = None, **fields: Any
) -> PackedScalarModel:
    """A reward model above a policy that was exported, its trainable weights moved away from there."""
    policy = exported(trained({"model_type": "llama", **fields}, dtype), folder)
    config = ModelConfig(path=str(policy), dtype=dtype, lora=lora or LoraConfig())
    model = load_model(config, tiny_tokenizer(CHATML), NEW_REWARD_MODEL, seed=0, device=CPU)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    return packed_scorer(model.eval())


@torch.no_grad()
def exported_scorer(packed: PackedScalarModel, folder: Path, **changes: Any) -> Path:
    probe, details = ask_live(packed, DOCUMENTS), {"calibration": {"mean": 0.5, "std": 2.0}}
    tokenizer = tiny_tokenizer(CHATML)
    return export_model(
        packed.model, packed.state_dict(), tokenizer, folder, replace(probe, **changes), details=details
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
    assert torch.allclose(scores, packed.answers(DOCUMENTS), atol=1e-5) and scores.std() > 0.01
    assert Artifact.load(folder, Role.reward_model).manifest.details["largest_score_difference"] <= 1e-6


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_merged_and_the_trained_head_taken_along(dora: bool, tmp_path: Path) -> None:
    packed = trained_scorer(tmp_path / "policy", lora=LoraConfig(enabled=True, r=4, alpha=8, dora=dora))
    head = packed.base().score
    assert not torch.equal(head.original_module.weight, head.modules_to_save["default"].weight)
    before = packed.answers(DOCUMENTS).detach()
    folder = exported_scorer(packed, tmp_path / "export")
    assert torch.allclose(batched_scores(folder, "right"), before, atol=1e-5)
    written = load_file(folder / "model.safetensors")
    assert torch.equal(written["score.weight"], head.modules_to_save["default"].weight)
    assert not any("lora" in name or "modules_to_save" in name for name in written)
    assert "base_model.model.score.weight" in load_file(folder / "adapter" / "adapter_model.safetensors")
    assert torch.equal(packed.answers(DOCUMENTS), before)


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
    wrong = packed.answers(DOCUMENTS).detach() + 1e-3
    with pytest.raises(ExportMismatch, match="reloaded scores differ"):
        exported_scorer(packed, tmp_path / "export", answer=wrong)
    assert not (tmp_path / "export").exists()


def test_a_pad_that_ends_turns_is_refused(tmp_path: Path) -> None:
    packed = trained_scorer(tmp_path / "policy")
    packed.base().config.pad_token_id = END
    with pytest.raises(ValueError, match="plain transformers would score another token"):
        exported_scorer(packed, tmp_path / "export")
