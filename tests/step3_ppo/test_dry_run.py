"""The preview shows what the policy will be asked and what its rewards will be told, before it is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from step3_ppo import dry_run as module
from step3_ppo.config import PPOJob
from step3_ppo.dry_run import preview
from tests.tiny import CHATML, tiny_tokenizer


def test_prompts_are_shown_as_the_model_sees_them_with_the_other_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"what is {n}?", "reference": "long " * 60, "n": [n]} for n in range(7)]
    rows += [{"prompt": "what is 3?"}, {"prompt": "a" * 90}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked_of: list[str | None] = []

    def load_tokenizer(model: object) -> object:
        asked_of.append(model.path)  # type: ignore[attr-defined]
        return tiny_tokenizer(CHATML)

    monkeypatch.setattr(module, "load_tokenizer", load_tokenizer)
    job = PPOJob(output_dir=str(tmp_path))
    job.model.path = "base"
    job.ppo.data.path, job.ppo.data.max_length, job.ppo.data.eval_fraction = (
        str(tmp_path / "rows.jsonl"),
        80,
        0,
    )
    job.ppo.rollout.max_new_tokens = 24
    preview(job, tmp_path)
    printed = capsys.readouterr().out
    assert asked_of == ["base"]  # there is no policy yet
    assert printed.count("--- row ") == 5 and "trained" not in printed.partition("source")[0]
    assert printed.count('<|im_end|>\n<|im_start|>assistant\n\nother columns:\nreference: "long long') == 5
    assert printed.count("…\nn: [") == 5  # a long value is cut
    assert "prompt (29 tokens):\n<|im_start|>user\nwhat is " in printed
    assert "7 documents, 203 tokens; median 29, longest 29; max_length 56" in printed
    assert "1 × the same prompt as an earlier row" in printed
    assert "1 × longer than data.max_length=80 less the 24 tokens kept for a response" in printed
