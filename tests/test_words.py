"""Rules of CONTRIBUTING.md: names that its glossary replaced do not come back, and no file grows too long."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".yaml", ".jinja", ".toml"}
FOLDERS = [
    "pipeline",
    "common",
    "step1_sft",
    "step2_reward",
    "step2_dpo",
    "step3_ppo",
    "launch",
    "conf",
    "demo",
    "docs",
    "benchmarks",
    "evaluation",
]
REPLACED = {
    r"from_main|of_all_ranks|wait_for_main|is_main": "broadcast_from_rank0, all_gather_or_raise, is_rank0",
    r"divided anew|divides? anew|divided_anew": "reshard",
    r"moments\.at|moments\.now|faults? on demand": "phases, injected fault",
    r"\bEnding\b": "HeadSpec",
    r"\b(?:Heard|Beat|Verdict)\b": "HeartbeatMonitor, Heartbeat, Diagnosis",
    r"_Door\b|send_home": "_Rendezvous, dismiss",
    r"leaders?_of|\bleaders?\b": "owner of a shared prefix, prefix group",
    r"\bKind\[|data\.kinds": "DatasetType, data.dataset_types",
    r"\bMade\[|refuse_loss|lost_in_turn|lost_by_template": "RowRecords, refuse_left_out, left_out_of_turn",
    r"\bSubject\b|load_subject": "InferenceModel, load_inference_model",
    r"SamplingRule|\brule_of\(": "SamplingParams",
    r"\bWatched\b|watched_by_all|ExponentialAverage": "EarlyStopping, ExponentialMovingAverage",
    r"foresight|foresee\(|account_of": "fallbacks, notice_fallbacks, training_record",
    r"(?<!Approximating KL )\b[Dd]ivergences?\b": "KL",
}


def test_replaced_words_do_not_come_back() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    files += [ROOT / "README.md"]
    assert len(files) > 200
    found = [
        f"{path.relative_to(ROOT)}: {match.group()!r}, now {instead}"
        for path in files
        for pattern, instead in REPLACED.items()
        for match in re.finditer(pattern, path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_the_glossarys_words_stand_where_their_thing_is() -> None:
    where = {
        "loss mask": "common/data/chat.py",
        "Continuous batching": "common/decoding/scheduler.py",
        "prefix sharing": "common/data/batches.py",
        "KL penalty": "step3_ppo/advantages.py",
        "[Bb]roadcast": "common/runtime/distributed.py",
        "Reshard": "common/training/reshard.py",
        "Heartbeats": "common/runtime/heartbeat.py",
    }
    assert [word for word, path in where.items() if not re.search(word, (ROOT / path).read_text())] == []


def test_no_file_has_more_than_450_lines() -> None:
    files = [path for folder in [*FOLDERS, "tests"] for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 500
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {path: count for path, count in lines.items() if count > 450} == {}
