"""An artifact in another dtype has each weight rounded once, and says what that cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.artifacts import CARD, Artifact, Manifest, hash_files, read_manifest, write_manifest
from common.config import Dtype
from common.errors import UserError
from common.stage import Role
from common.training.rounding import DTYPES, RoundingStats, round_artifact, rounding_stats
from tests.common.training.exporting import KINDS, exported, trained


@pytest.mark.parametrize("dtype", [Dtype.bf16, Dtype.fp16])
def test_every_weight_is_rounded_once_and_plain_transformers_loads_them(dtype: Dtype, tmp_path: Path) -> None:
    whole = exported(trained(KINDS["tied"]), tmp_path / "export")
    said = round_artifact(whole, dtype, tmp_path / "rounded")
    artifact = Artifact.load(tmp_path / "rounded", Role.policy)
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, artifact.path))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor.to(DTYPES[dtype])) for name, tensor in before.items())
    name = str(DTYPES[dtype]).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert model.dtype is DTYPES[dtype] and artifact.manifest.details["dtype"] == name
    assert f"in {name}" in (artifact.path / CARD).read_text()
    assert said.startswith(f"float32 to {name}: ") and "of the weights changed, by " in said
    assert {path.name for path in whole.iterdir()} == {path.name for path in artifact.path.iterdir()}
    assert read_manifest(whole).details["dtype"] == "float32"


def test_a_wider_dtype_loses_nothing(tmp_path: Path) -> None:
    whole = exported(trained(KINDS["llama"], Dtype.bf16), tmp_path / "export")
    assert round_artifact(whole, Dtype.fp32, tmp_path / "wide") == "bfloat16 to float32: no weight changed"


def test_what_is_lost_is_counted() -> None:
    before = torch.tensor([1.0, 1 + 2.0**-10, 1e-9, 0.0])
    lost = rounding_stats(before, before.half()) + rounding_stats(before[:1], before[:1].half())
    assert (lost.weights, lost.changed, lost.zeroed) == (5, 1, 1)
    assert (
        lost.in_words("a", "b")
        == f"a to b: 20.0% of the weights changed, by {lost.relative:.2g} of their size, and 1 became 0"
    )
    assert RoundingStats().in_words("a", "b") == "a to b: no weight changed"


def test_weights_that_fp16_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    whole = exported(trained(KINDS["llama"]), tmp_path / "export")
    tensors = load_file(whole / "model.safetensors")
    tensors["model.norm.weight"][3] = 70_000
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    manifest = read_manifest(whole)
    write_manifest(whole, Manifest(manifest.kind, manifest.role, hash_files(whole), manifest.details))
    with pytest.raises(
        UserError, match=r"model\.norm\.weight has weights up to 7e\+04, which torch.float16 cannot"
    ):
        round_artifact(whole, Dtype.fp16, tmp_path / "rounded")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    whole = exported(trained(KINDS["llama"]), tmp_path / "export")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        round_artifact(whole, Dtype.fp16, tmp_path / "rounded")


def test_the_index_of_weights_in_several_files_has_the_new_size(tmp_path: Path) -> None:
    whole = exported(trained(KINDS["llama"]), tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(whole)
    (whole / "model.safetensors").unlink()
    model.save_pretrained(whole, max_shard_size="40KB")
    manifest = read_manifest(whole)
    write_manifest(whole, Manifest(manifest.kind, manifest.role, hash_files(whole), manifest.details))
    round_artifact(whole, Dtype.bf16, tmp_path / "half")
    before, after = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (whole, tmp_path / "half")
    )
    assert len(set(before["weight_map"].values())) > 1 and after["weight_map"] == before["weight_map"]
    assert after["metadata"]["total_size"] * 2 == before["metadata"]["total_size"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype is torch.bfloat16
