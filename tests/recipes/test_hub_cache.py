"""Folders whose names are commits: a model in the hub's cache, and an output folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from common.artifacts import verify
from tests import tiny_run

pytestmark = pytest.mark.slow  # whole runs

COMMIT = "4f5ba1d2c3e4f5061728394a5b6c7d8e9f001122"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the hub's cache lays it out: files by their hash, and a folder of links to them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.model.tokenizer import train_tokenizer

    repository = tmp_path_factory.mktemp("hub") / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / COMMIT
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=128, **shape))
    made.save_pretrained(repository / "made")
    train_tokenizer(["What is 1 + 2?", "3"], 300).save_pretrained(repository / "made")
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in (repository / "made").iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_model_in_the_hub_s_cache_is_trained_below_a_folder_named_by_a_commit(
    model: Path, tmp_path: Path
) -> None:
    plain = [text for text in tiny_run.sft(tmp_path / COMMIT, steps=2) if not text.startswith("model.config")]
    typed = [text for text in plain if not text.startswith("model.tokenizer")]
    printed = tiny_run.finish([*typed, f"model.path={model}", "model.chat_template=plain", "run_name=a"])
    run_dir = tmp_path / COMMIT / "runs" / "a"
    assert "credential" not in printed and "redacted" not in printed
    for file in ("resolved.yaml", "sft/state.json", "lineage.json", "report.html"):
        text = (run_dir / file).read_text()
        assert "redacted" not in text, file
    assert f"path: {model}" in (run_dir / "resolved.yaml").read_text()
    assert not list(tmp_path.rglob("*redacted*"))
    manifest = verify(run_dir / "sft" / "export")
    assert manifest.details["base_model"] == str(model)
