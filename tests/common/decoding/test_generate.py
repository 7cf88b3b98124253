"""A file of completions: what its lines say, that it is gone on with exactly, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from common.artifacts import Artifact
from common.config import DataConfig, Dtype
from common.decoding import generate as module
from common.decoding.completions import CompletionsFile
from common.decoding.generate import generate
from common.errors import UserError
from common.inference_config import GenerateJob, ManySettings
from common.stage import Role
from tests import forked
from tests.step2_dpo.runs import make_policy, write_rows
from tests.tiny import CHATML, tiny_tokenizer

PROMPTS = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(4) for b in range(3)]
SETTINGS = ManySettings(temperature=1.0, max_new_tokens=12, samples=2, seed=5, slots=4, dtype=Dtype.fp32)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    tiny_tokenizer(CHATML).save_pretrained(folder / "tokenizer")
    return make_policy(folder / "export", folder / "tokenizer")


def job(folder: Path, policy: Path, name: str = "out.jsonl", **settings: Any) -> GenerateJob:
    rows = folder / "prompts.jsonl"
    if not rows.exists():
        write_rows(rows, PROMPTS)
    data = DataConfig(path=str(rows), cache_dir=str(folder / "cache"))
    return GenerateJob(
        str(policy), data, dataclasses.replace(SETTINGS, **settings), str(folder / name), whole_context=True
    )


def lines(given: GenerateJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(given.out).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a process that nothing interrupted."""
    given = job(tmp_path_factory.mktemp("whole"), policy)
    assert generate(given) == 0
    return Path(given.out).read_bytes()


def test_a_line_for_each_prompt_in_order_with_what_was_said(whole: bytes) -> None:
    found = [json.loads(line) for line in whole.splitlines()]
    assert [line["index"] for line in found] == list(range(len(PROMPTS)))
    assert [line["row"] for line in found] == [f"prompts:{number}" for number in range(1, 13)]
    assert [line["prompt"] for line in found] == [row["prompt"] for row in PROMPTS]
    assert [line["columns"]["answer"] for line in found] == [row["answer"] for row in PROMPTS]
    for line in found:
        assert line["seed"] == 5 and len(line["completions"]) == 2
        for said in line["completions"]:
            assert said["logprob"] < 0 and 1 <= said["tokens"] <= 12
            assert said["stopped"] or said["tokens"] == 12
    texts = {said["text"] for line in found for said in line["completions"]}
    assert len(texts) > len(PROMPTS)  # samples of a prompt differ


@pytest.mark.parametrize("dtype", [Dtype.fp32, Dtype.bf16])
def test_a_file_that_was_cut_anywhere_ends_as_if_it_had_not_been(
    dtype: Dtype, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_REQUESTS", 10)
    given = job(tmp_path, policy, dtype=dtype)
    generate(given)
    whole = Path(given.out).read_bytes()
    assert whole.count(b"\n") == len(PROMPTS)
    for kept in (0, 1, whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1, len(whole)):
        Path(given.out).write_bytes(whole[:kept])
        generate(given)
        assert Path(given.out).read_bytes() == whole


def test_where_others_may_show_in_the_last_bits_a_chunk_is_computed_again(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    complete = module.complete
    monkeypatch.setattr(module, "CHUNK_REQUESTS", 10)
    monkeypatch.setattr(module, "complete", lambda *given: begun.append(given[2].start) or complete(*given))
    for dtype, first in ((Dtype.fp32, 7), (Dtype.bf16, 5)):
        given = job(tmp_path, policy, f"{dtype.value}.jsonl", dtype=dtype)
        generate(given)
        whole = Path(given.out).read_bytes()
        Path(given.out).write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
        begun.clear()
        generate(given)
        assert begun[0] == first and Path(given.out).read_bytes() == whole


def killed(written: str, lines_left: int) -> int:
    """`generate`, killed in the middle of writing a line."""
    from common.decoding import completions
    from common.fields import as_schema

    append = completions.write_whole

    def die(file: Any, line: bytes) -> None:
        if file.tell() and len(Path(file.name).read_bytes().splitlines()) == lines_left:
            file.write(line[:20])
            os.kill(os.getpid(), signal.SIGKILL)
        append(file, line)

    completions.write_whole = die
    return generate(as_schema(GenerateJob, json.loads(Path(written).read_text())))


def test_a_process_that_was_killed_while_it_wrote_is_gone_on_with_bit_for_bit(
    policy: Path, whole: bytes, tmp_path: Path
) -> None:
    from common.config import to_plain

    given = job(tmp_path, policy)
    (tmp_path / "job.json").write_text(json.dumps(to_plain(given)))
    ranks = forked.start(killed, [str(tmp_path / "job.json"), 5], 1, tmp_path / "printed.txt")
    assert ranks.finish() == [-signal.SIGKILL]
    torn = Path(given.out).read_bytes()
    assert torn.count(b"\n") == 5 and not torn.endswith(b"\n") and whole.startswith(torn)
    generate(given)
    assert Path(given.out).read_bytes() == whole


def test_completions_do_not_depend_on_how_many_are_decoded_side_by_side(
    policy: Path, whole: bytes, tmp_path: Path
) -> None:
    given = job(tmp_path, policy, slots=1)
    generate(given)
    assert Path(given.out).read_bytes() == whole


def test_other_settings_prompts_and_weights_are_refused_with_what_differs(
    policy: Path, tmp_path: Path
) -> None:
    given = job(tmp_path, policy)
    generate(given)
    before = Path(given.out).read_bytes()
    with pytest.raises(UserError, match=r"seed=6 \(it was 5\), temperature=0.5 \(it was 1.0\)"):
        generate(job(tmp_path, policy, seed=6, temperature=0.5))
    other = make_policy(tmp_path / "other", policy.parent / "tokenizer", seed=1)
    with pytest.raises(UserError, match=r"now there is another model\n") as error:
        generate(job(tmp_path, other))
    assert "--out NEW_FILE" in str(error.value.hint)
    write_rows(tmp_path / "prompts.jsonl", PROMPTS[1:])
    with pytest.raises(UserError, match=r"now there is other prompts\n"):
        generate(given)
    assert Path(given.out).read_bytes() == before


def test_cuda_graphs_are_switched_off_and_a_file_goes_on_without_them(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    class Asked(module.Decoder):
        def __init__(self, model: Any, *, slots: int, cuda_graphs: bool = True) -> None:
            asked.append(cuda_graphs)
            super().__init__(model, slots=slots, cuda_graphs=cuda_graphs)

    monkeypatch.setattr(module, "Decoder", Asked)
    given = job(tmp_path, policy)
    generate(given)
    whole = Path(given.out).read_bytes()
    Path(given.out).write_bytes(whole[: len(whole) // 2])
    assert generate(job(tmp_path, policy, cuda_graphs=False)) == 0
    assert asked == [True, False] and Path(given.out).read_bytes() == whole


def test_a_system_message_is_for_the_prompts_that_have_none(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        {"prompt": "a b"},
        {"prompt": "a b", "system": "c"},
        {"messages": [{"role": "user", "content": "d"}]},
    ]
    write_rows(tmp_path / "prompts.jsonl", asked[:2])
    given = dataclasses.replace(job(tmp_path, policy), system="e")
    generate(given)
    assert "note: 1 of 2 prompts have a system message of their own, and keep it" in capsys.readouterr().out
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a b", "system": "e"}, asked[1]])
    same = job(tmp_path, policy, "same.jsonl")
    generate(same)
    said = [[line["completions"] for line in lines(each)] for each in (given, same)]
    assert said[0] == said[1] and lines(given)[0]["prompt"] == "a b"
    with pytest.raises(UserError, match=r"system=None \(it was e\)"):
        write_rows(tmp_path / "prompts.jsonl", asked[:2])
        generate(dataclasses.replace(given, system=None))
    write_rows(tmp_path / "prompts.jsonl", asked[2:])
    generate(dataclasses.replace(given, out=str(tmp_path / "turns.jsonl")))
    assert "of their own" not in capsys.readouterr().out


def test_the_same_model_at_another_place_goes_on(policy: Path, whole: bytes, tmp_path: Path) -> None:
    import shutil

    given = job(tmp_path, policy)
    generate(given)
    Path(given.out).write_bytes(whole[: whole.index(b"\n") + 1])
    shutil.copytree(policy, tmp_path / "moved")
    generate(job(tmp_path, tmp_path / "moved"))
    assert Path(given.out).read_bytes() == whole


def test_nothing_that_was_not_begun_here_is_written_to(policy: Path, tmp_path: Path) -> None:
    given = job(tmp_path, policy)
    Path(given.out).write_text("mine\n")
    with pytest.raises(UserError, match="exists, without out.jsonl.settings.json beside it"):
        generate(given)
    assert Path(given.out).read_text() == "mine\n"
    Path(given.out).unlink()
    generate(given)
    text = Path(given.out).read_text()
    Path(given.out).write_text("mine\n" + text)
    with pytest.raises(UserError, match="out.jsonl:1 is not the line that was written there"):
        generate(given)
    assert Path(given.out).read_text() == "mine\n" + text


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        CompletionsFile(path, {"seed": 1}),
        pytest.raises(UserError, match="is being written by another process"),
        CompletionsFile(path, {"seed": 1}),
    ):
        pass


def test_prompts_without_room_are_dropped_and_counted(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "prompts.jsonl", [*PROMPTS[:2], {"prompt": "x" * 3000, "answer": ""}])
    given = job(tmp_path, policy)
    generate(given)
    assert [line["row"] for line in lines(given)] == ["prompts:1", "prompts:2"]
    printed = capsys.readouterr().out
    assert "less the 12 tokens kept for a response" in printed and "prompts.jsonl:3" in printed
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        generate(job(tmp_path, policy, "none.jsonl", max_new_tokens=100_000))


def test_variables_of_the_template_are_those_of_the_training(policy: Path) -> None:
    artifact = Artifact.load(policy, Role.policy)
    details = {**artifact.manifest.details, "data": {"chat_template_kwargs": {"enable_thinking": False}}}
    trained = Artifact(artifact.path, dataclasses.replace(artifact.manifest, details=details))
    ours = module.as_trained(DataConfig(), trained, whole_context=False)
    assert ours.chat_template_kwargs == {"enable_thinking": False} and ours.max_length == 2048
    typed = module.as_trained(DataConfig(chat_template_kwargs={"a": 1}), trained, whole_context=True)
    assert typed.chat_template_kwargs == {"a": 1} and typed.max_length != 2048
