from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common.artifacts import Artifact, file_sha256
from common.config import Dtype, ModelConfig
from common.errors import UserError
from common.stage import Role
from common.training.import_model import import_model
from tests.common.training.exporting import MIXTURES, published

SCORER = AutoModelForSequenceClassification


def imported(folder: Path, role: Role = Role.policy, **changes: Any) -> Artifact:
    out = folder.with_name("imported")
    return Artifact.load(import_model(ModelConfig(path=str(folder), **changes), role, out), role)


def refusal(folder: Path, role: Role = Role.policy) -> UserError:
    with pytest.raises(UserError) as error:
        imported(folder, role)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    return error.value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, MIXTURES["qwen3_moe"]], ids=str)
def test_a_policy_has_the_published_weights_bit_for_bit(
    fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = published(tmp_path / "model", dtype=dtype, **fields)
    artifact = imported(folder)
    given, taken = (load_file(path / "model.safetensors") for path in (folder, artifact.path))
    assert given.keys() == taken.keys()
    for name, tensor in given.items():
        assert tensor.dtype == taken[name].dtype == dtype and torch.equal(tensor, taken[name]), name
    assert artifact.manifest.details["imported"] == {
        "from": str(folder), "weights": {"model.safetensors": file_sha256(folder / "model.safetensors")},
        "pad_token_id": 0,
    }  # fmt: skip
    assert artifact.manifest.details["base_model"] == str(folder)
    assert artifact.manifest.details["terminators"] == [4]  # <|im_end|>


def test_weights_of_several_dtypes_are_kept_in_the_widest(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    given = load_file(folder / "model.safetensors")
    given["model.norm.weight"] = torch.full((32,), 1.0 + 2.0**-20)  # no number of bf16
    save_file(given, folder / "model.safetensors", metadata={"format": "pt"})
    taken = load_file(imported(folder).path / "model.safetensors")
    assert all(torch.equal(taken[name], tensor.float()) for name, tensor in given.items())


def test_a_reward_model_has_the_published_weights_and_scores_as_plain_transformers(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", SCORER, labels=1)
    artifact = imported(folder, Role.reward_model)
    given, taken = (load_file(path / "model.safetensors") for path in (folder, artifact.path))
    assert all(torch.equal(tensor, taken[name]) for name, tensor in given.items())
    plain = [SCORER.from_pretrained(path).eval() for path in (folder, artifact.path)]
    with torch.no_grad():
        before, after = (model(torch.arange(5, 25)[None]).logits for model in plain)
    assert torch.equal(before, after)


def test_a_template_can_be_given_to_a_model_without_one(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", template=None)
    assert "has no chat template" in refusal(folder).message
    artifact = imported(folder, chat_template="chatml")
    assert artifact.manifest.details["terminators"] == [4]
    given, taken = (load_file(path / "model.safetensors") for path in (folder, artifact.path))
    assert all(torch.equal(tensor, taken[name]) for name, tensor in given.items())


@pytest.mark.parametrize(
    ("make", "fields", "role", "says"),
    [
        (SCORER, {"labels": 1}, Role.policy, "it is a LlamaForSequenceClassification, where a causal LM"),
        (
            AutoModelForCausalLM,
            {},
            Role.reward_model,
            "it is a LlamaForCausalLM, where a sequence classifier",
        ),
        (SCORER, {"labels": 3}, Role.reward_model, "has 3 labels, where a reward model has one"),
    ],
)
def test_a_head_that_is_not_the_roles_is_refused_by_name(
    make: Any, fields: dict[str, Any], role: Role, says: str, tmp_path: Path
) -> None:
    assert says in refusal(published(tmp_path / "model", make, **fields), role).message


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    given = load_file(folder / "model.safetensors")
    given["model.norm.weight"] = torch.ones(32).to(torch.float8_e4m3fn)
    save_file(given, folder / "model.safetensors", metadata={"format": "pt"})
    assert "its weights are F8_E4M3: quantised weights are not trained" in refusal(folder).message


def test_a_damaged_header_and_pickles_are_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "damaged" in refusal(folder).message
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "a pickle, which can run code" in refusal(folder).message


def test_a_template_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ 'x' }}"}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert "template" in refusal(folder).message


def test_the_dtype_of_a_run_has_no_part_in_it(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    taken = load_file(imported(folder, dtype=Dtype.fp32).path / "model.safetensors")
    assert {tensor.dtype for tensor in taken.values()} == {torch.bfloat16}


def adapter_for(base: Path, folder: Path, **changes: Any) -> Path:
    """A LoRA adapter as peft saves it, whose weights have moved."""
    import peft

    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**saved, "base_model_name_or_path": str(base), **changes})
    )
    return folder


def test_an_adapter_is_merged_into_its_base_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    import peft

    base = published(tmp_path / "base")
    folder = adapter_for(base, tmp_path / "adapter")
    artifact = imported(folder)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload().state_dict()
    taken = load_file(artifact.path / "model.safetensors")
    moved = 0
    for name, tensor in load_file(base / "model.safetensors").items():
        moved += not torch.equal(tensor, taken[name])
        expected = merged[name].to(torch.bfloat16)
        # a sum in another order may round to the neighbour
        assert torch.allclose(taken[name].float(), expected.float(), rtol=2**-7), name
        assert (taken[name] != expected).float().mean() < 0.01
    assert moved == 4  # two matrices in each of two layers
    details = artifact.manifest.details
    assert details["base_model"] == str(base) and details["imported"]["from"] == str(folder)
    assert set(details["imported"]["weights"]) == {"model.safetensors", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_model_name_or_path": "/no/such/base"}, "its base /no/such/base cannot be had: "),
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"peft_type": "IA3"}, "is of the kind IA3, where LORA is merged"),
        ({"modules_to_save": ["lm_head"]}, "changes more than matrices (modules_to_save)"),
        ({"bias": "all"}, "changes biases"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_what_it_lacks(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    base = published(tmp_path / "base")
    assert says in refusal(adapter_for(base, tmp_path / "here" / "adapter", **changes)).message


def test_an_adapter_of_another_model_or_without_weights_is_refused(tmp_path: Path) -> None:
    base, other = published(tmp_path / "base"), published(tmp_path / "other", hidden_size=64)
    (tmp_path / "here").mkdir()
    folder = adapter_for(base, tmp_path / "here" / "adapter", base_model_name_or_path=str(other))
    assert f"does not fit {other}" in refusal(folder).message
    (folder / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refusal(folder).message
    assert "only adapters of policies" in refusal(folder, Role.reward_model).message
