"""An artifact on the hub is what it was here, and whatever comes between is told, undone or gone on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from safetensors.torch import load_file

from common.artifacts import CARD, Manifest, hash_files, read_manifest, verify, write_manifest
from common.errors import UserError
from common.stage import Role
from pipeline.__main__ import dispatch
from tests import fake_hub
from tests.common.training.exporting import KINDS, exported, trained
from tests.fake_hub import FakeHub, Repository

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that this process's client asks, with a token that may write."""
    with fake_hub.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its retries
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(trained(KINDS["tied"]), tmp_path_factory.mktemp("made") / "export")


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(made, tmp_path / "export"))


def push(artifact: Path, name: str = "me/mine", *options: str) -> None:
    assert dispatch(["export", str(artifact), "--push", name, *options]) == 0


def refusal(artifact: Path, name: str = "me/mine", *options: str) -> UserError:
    with pytest.raises(UserError) as error:
        push(artifact, name, *options)
    verify(artifact)
    return error.value


def test_what_was_pushed_is_loaded_by_name_through_the_same_hub(
    hub: FakeHub, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(artifact)
    assert f"pushed    {hub.url}/me/mine (public), commit " in capsys.readouterr().out
    files = hub.repositories["me/mine"].files
    assert set(files) == {".gitattributes", *(path.name for path in artifact.iterdir())}
    assert all(files[path.name] == path.read_bytes() for path in artifact.iterdir() if path.name != CARD)
    card = files[CARD].decode()
    assert card == (artifact / CARD).read_text().replace('model_path = "."', 'model_path = "me/mine"')
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", LOAD, "me/mine", str(tmp_path / "again")]
    subprocess.run(command, env=environment, check=True, timeout=120)
    before, after = (load_file(folder / "model.safetensors") for folder in (artifact, tmp_path / "again"))
    assert before.keys() == after.keys() and all(
        (after[name] == tensor).all() for name, tensor in before.items()
    )
    assert (tmp_path / "again" / "chat_template.jinja").read_bytes() == files["chat_template.jinja"]


def test_an_upload_that_broke_off_is_completed_by_the_same_command(hub: FakeHub, artifact: Path) -> None:
    hub.breaks_after = 0
    error = refusal(artifact)
    assert "--push me/mine: " in error.message and "the same command again goes on" in str(error.hint)
    assert len(hub.repositories["me/mine"].commits) == 1  # as it was made
    hub.breaks_after = None
    push(artifact)
    push(artifact)  # once more: nothing is uploaded twice
    assert len(hub.uploads) == 1 and "model.safetensors" in hub.repositories["me/mine"].files


def test_a_private_repository_is_private(hub: FakeHub, artifact: Path) -> None:
    push(artifact, "lab/ours", "--private")
    assert hub.repositories["lab/ours"].private
    push(artifact, "lab/ours")
    assert hub.repositories["lab/ours"].private


def test_nothing_is_pushed_in_private_to_what_is_public(hub: FakeHub, artifact: Path) -> None:
    hub.repositories["me/mine"] = Repository()
    assert (
        "is there already, and public; nothing was uploaded"
        in refusal(artifact, "me/mine", "--private").message
    )
    assert not hub.uploads and len(hub.repositories["me/mine"].commits) == 1


def test_weights_of_another_artifact_are_removed_where_they_would_be_loaded(
    hub: FakeHub, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}", "plot.png": b"p"}
    hub.repositories["me/mine"] = Repository(commits=[old])
    push(artifact)
    files = hub.repositories["me/mine"].files
    assert "plot.png" in files and "model.safetensors" in files
    assert not {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} & set(files)
    assert "model.safetensors.index.json in me/mine is not of this artifact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mine", "names no owner"), ("a/b/c", "Repo id must"), ("me/mi ne", "Repo id must"),
        ("other/mine", "the token may not do this: You don't have the rights"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_pushed_to_is_refused(
    hub: FakeHub, artifact: Path, name: str, says: str
) -> None:
    assert says in refusal(artifact, name).message
    assert not hub.repositories


def test_without_a_token_or_with_one_that_is_not_taken_nothing_is_begun(
    hub: FakeHub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    error = refusal(artifact)
    assert error.message == "--push me/mine: the hub does not take the token" and "hf_bbb" not in str(error)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "needs a token of the hub, and there is none" in refusal(artifact).message
    assert not hub.repositories


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_is_told(hub: FakeHub, artifact: Path, status: int) -> None:
    hub.status = status
    assert f"the hub answers {status}" in refusal(artifact).message


def test_a_hub_that_is_not_there_is_told(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    assert "the hub cannot be reached" in refusal(artifact).message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(artifact).message


def test_a_card_that_the_hub_refuses_is_told_and_can_be_corrected(hub: FakeHub, artifact: Path) -> None:
    card = (artifact / CARD).read_text()
    (artifact / CARD).write_text(card.replace("library_name", "license: []\nlibrary_name"))
    assert '"license" must be a string' in refusal(artifact).message
    (artifact / CARD).write_text(card.replace("To be filled in by whoever publishes this model", "For sums"))
    push(artifact)
    assert b"For sums" in hub.repositories["me/mine"].files[CARD]


def test_folders_of_this_machine_in_the_manifest_are_told(
    hub: FakeHub, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(artifact)
    details = {**manifest.details, "base_model": "/home/me/base", "adapter_of": "base"}
    write_manifest(artifact, Manifest(manifest.kind, manifest.role, hash_files(artifact), details))
    push(artifact)
    printed = capsys.readouterr().out
    assert "manifest.json names folders of this machine: /home/me/base" in printed
    assert "the adapters load on base, which others need as well" in printed


def test_another_form_is_pushed_and_the_same_command_again_makes_it_no_second_time(
    hub: FakeHub, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        push(artifact, "me/mine", "--dtype", "fp16")
    assert "was exported before" in capsys.readouterr().out
    config = json.loads(hub.repositories["me/mine"].files["config.json"])
    assert config["dtype"] == "float16" and len(hub.uploads) == 1


# --- llama.cpp --------------------------------------------------------------------------------------

CONVERTER = """
import pathlib, sys
model, _, out, _, kind = sys.argv[1:]
if (pathlib.Path(model) / "broken").exists():
    sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")
pathlib.Path(out).write_bytes(b"GGUF " + kind.encode())
"""


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    return folder


@pytest.mark.parametrize("how", ["folder", "file", "path"])
def test_the_converter_is_found_and_writes_the_dtype_that_the_artifact_has(
    how: str, llama_cpp: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "file":
        monkeypatch.setenv("LLAMA_CPP", str(llama_cpp / "convert_hf_to_gguf.py"))
    elif how == "path":
        monkeypatch.delenv("LLAMA_CPP")
        monkeypatch.setenv("PATH", f"{llama_cpp}:{os.environ['PATH']}")
    file = tmp_path / "models" / "m.gguf"
    assert dispatch(["export", str(artifact), "--gguf", str(file)]) == 0
    assert file.read_bytes() == b"GGUF f32" and [path.name for path in file.parent.iterdir()] == ["m.gguf"]
    with pytest.raises(UserError, match=r"m\.gguf exists, and nothing is overwritten"):
        dispatch(["export", str(artifact), "--gguf", str(file)])


def test_without_a_converter_the_way_to_get_one_is_told(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(UserError, match="neither on PATH nor in LLAMA_CPP") as error:
        dispatch(["export", str(artifact), "--gguf", str(tmp_path / "m.gguf")])
    assert "git clone" in str(error.value.hint)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(UserError, match=r"LLAMA_CPP=.* holds no convert_hf_to_gguf\.py"):
        dispatch(["export", str(artifact), "--gguf", str(tmp_path / "m.gguf")])


def test_what_the_converter_refuses_is_told_and_leaves_no_file(
    llama_cpp: Path, artifact: Path, tmp_path: Path
) -> None:
    (artifact / "broken").touch()
    with pytest.raises(UserError, match="refuses .*export: NotImplementedError: BPE pre-tokenizer"):
        dispatch(["export", str(artifact), "--gguf", str(tmp_path / "m.gguf")])
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*gguf*"))


def test_what_has_no_gguf_and_private_without_a_push_are_refused_at_once(
    llama_cpp: Path, artifact: Path
) -> None:
    with pytest.raises(UserError, match="--gguf takes a whole model"):
        dispatch(["export", str(artifact), "--gguf", "m.gguf", "--adapter"])
    with pytest.raises(UserError, match="--private is of a push"):
        dispatch(["export", str(artifact), "--private"])
    manifest = read_manifest(artifact)
    write_manifest(artifact, Manifest("artifact", Role.reward_model, manifest.files, manifest.details))
    with pytest.raises(UserError, match="no format for a classifier"):
        dispatch(["export", str(artifact), "--gguf", "m.gguf"])
