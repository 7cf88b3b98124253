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
