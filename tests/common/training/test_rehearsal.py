"""What can only fail at export is found before anything is trained, on a small copy of the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import LoraConfig, ModelConfig
from common.errors import UserError
from common.model import adapters
from common.model.architecture import CAUSAL_LM, build_config
from common.model.scalar_head import NEW_REWARD_MODEL
from common.training import export_model, rehearsal
from common.training.rehearsal import rehearse_export

LARGE = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "tie_word_embeddings": True}


def said(model: ModelConfig, head: Any = CAUSAL_LM) -> list[str]:
    lines: list[str] = []
    rehearse_export(model, head, lines.append)
    return lines


@pytest.mark.parametrize("head", [CAUSAL_LM, NEW_REWARD_MODEL], ids=["policy", "reward"])
@pytest.mark.parametrize("enabled", [False, True])
def test_what_comes_back_is_let_through_without_a_word_and_moves_no_random_state(
    enabled: bool, head: Any
) -> None:
    before = torch.get_rng_state()
    assert said(ModelConfig(config=LARGE, lora=LoraConfig(enabled=enabled)), head) == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_adapters_on_experts_come_back(kind: str) -> None:
    assert said(ModelConfig(config={"model_type": kind}, lora=LoraConfig(enabled=True))) == []


def test_weights_that_a_merge_would_lose_are_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    # the names under nested wrappers, as they once were taken
    monkeypatch.setattr(export_model, "base_name", lambda name: name.replace(".base_layer.", "."))
    lora = LoraConfig(enabled=True)
    with pytest.raises(UserError, match=r"model_type=mixtral with adapters on .* not be exported: .*lacks"):
        said(ModelConfig(config={"model_type": "mixtral"}, lora=lora))


def test_a_merge_that_is_wrong_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_merged", lambda layer: layer.get_base_layer().weight.clone())
    with pytest.raises(UserError, match="is not the merge of its adapter"):
        said(ModelConfig(config=LARGE, lora=LoraConfig(enabled=True)))


def test_targets_that_the_model_does_not_have_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    build_config({"model_type": "llama"}).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    lora = LoraConfig(enabled=True, targets=["q_proj", "wq"])
    with pytest.raises(UserError, match="nothing has the name wq"):
        said(ModelConfig(path=str(tmp_path), lora=lora))


def test_a_copy_that_cannot_be_made_is_said_and_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise TypeError("unsupported operand")

    monkeypatch.setattr(rehearsal, "_small", fails)
    assert said(ModelConfig(config=LARGE)) == [
        "note: the export of model_type=llama was not tried beforehand: TypeError: unsupported operand"
    ]
