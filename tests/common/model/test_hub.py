from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest

from common.config import ModelConfig
from common.errors import UserError
from common.model import hub
from common.model.hub import check_folder
from common.model.tokenizer import load_tokenizer
from common.tokenizer_files import check_tokenizer_files
from pipeline.planning.network import parameters_in


def test_a_missing_folder_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.path=.*nowhere does not exist"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "nowhere")))


def test_a_hub_name_without_a_network_names_it_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="model.path=someone/something is not a local folder.*hub") as caught:
        load_tokenizer(ModelConfig(path="someone/something"))
    assert "name the folder" in str(caught.value.hint)


def test_whether_the_hub_answers_is_known_without_its_clients_retries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        assert hub.hub_answers()
    assert not hub.hub_answers()


def test_a_hub_whose_name_cannot_be_looked_up_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    is_known = threading.Event()  # never, while it is asked
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: is_known.wait(10) and [])
    assert not hub.hub_answers(seconds=0.1)
    is_known.set()


def test_a_pipe_or_a_link_to_itself_in_a_models_folder_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is no file"):
        check_folder(tmp_path)
    assert parameters_in(tmp_path) == 0
    (tmp_path / "chat_template.jinja").symlink_to("chat_template.jinja")
    with pytest.raises(UserError, match=r"chat_template\.jinja is no file"):
        check_tokenizer_files(tmp_path, "model.path")
