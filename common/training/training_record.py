"""The record of a training in the manifest, for the model card: settings, rows by source, metrics before it.

Takes a job, a step's folder and the artifacts that training started from; returns JSON values without paths
of this machine: text settings are left out unless they have a fixed set of values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from common.artifacts import CARD, MANIFEST, Artifact, read_json, read_manifest
from common.card import HUB_NAME, license_in
from common.config import JobConfig, ModelConfig, to_plain
from common.handoff import TakenFrom
from common.model.hub import cached_card
from common.stage import Step

COUNTED = ("rows_read", "rows_kept", "rows_held_out", "tokens", "trained_tokens")
ALWAYS = ("global_batch_size", "max_length", "epochs", "scheduler", "warmup_ratio", "dtype", "r", "alpha")
"""Settings that are recorded even at their default."""
NOT_TOLD = (
    "sampling", "evaluation", "micro_batch_size", "eval_every", "save_every", "save_minutes",
    "entropy_every", "async_save", "keep_checkpoints", "export", "max_bad_rows", "compile",
    "gradient_checkpointing", "checkpointing_policy", "tiled_mlp", "activation_offload", "trust_remote_code",
    "offload_frozen", "slots",
)  # fmt: skip
"""Settings that change measurements or speed, but not the trained model."""


def training_record(
    job: JobConfig,
    step: Step,
    folder: Path,
    before: Mapping[str, float],
    *,
    total_steps: int,
    adapters: bool,
    taken_from: TakenFrom | None = None,
) -> dict[str, Any]:
    """The training of a step, by name.

    before: its metrics before the first step. total_steps: those of the whole training. adapters: LoRA.
    taken_from: the run, where a checkpoint of it is exported; None where the training itself ends.
    """
    part = getattr(job, step.value)
    groups = {"model": job.model, step.value: part}
    told = {name: value for key, group in groups.items() for name, value in settings_of(group, key)}
    told[f"{step.value}.optim.lr"] = part.peak_lr(lora=adapters)
    if part.train.max_steps is not None:  # takes the place of epochs
        told.pop(f"{step.value}.train.epochs")
    told |= taken_from.settings if taken_from is not None else {}
    return {
        "step": step.value,
        "total_steps": total_steps,
        "ended": taken_from is None or taken_from.ended,
        "adapters": adapters,
        "settings": dict(sorted({**told, "seed": job.seed}.items())),
        "rows": rows_of(folder / "ledger.json"),
        "before": {name: value for name, value in before.items() if name.startswith("eval/")},
    }


def settings_of(group: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Settings, by key, that decide the result and are not at their default, and those of `ALWAYS`."""
    for field in fields(group):
        value, key = getattr(group, field.name), f"{at}.{field.name}"
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name in NOT_TOLD or not getattr(value, "enabled", True):  # of adapters
            continue
        if is_dataclass(value):
            yield from settings_of(value, key)
        elif _is_told(value) and (value != default or field.name in ALWAYS):
            yield key, to_plain(value)


def _is_told(value: Any) -> bool:
    """Numbers, words of a list and switches; no text that may be a path."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, int | float) for item in value)
    return isinstance(value, bool | int | float | Enum)


def rows_of(ledger: Path) -> list[dict[str, Any]]:
    """Counts of the ledger, for each source."""
    return [
        {
            "name": Path(source["name"]).name or source["name"],
            **{name: source[name] for name in COUNTED},
            "dropped": sum(entry["count"] for entry in source["dropped"].values()),
        }
        for source in read_json(ledger)["sources"]
    ]


def origin_of(model: ModelConfig, revision: str | None, policy: Artifact | None) -> dict[str, Any]:
    """The published model at the root of a chain and its licence: what the policy that training started from
    says of it, or what `model` names. A folder goes by its licence alone: its path says nothing elsewhere."""
    if policy is not None:
        return dict(policy.manifest.details.get("origin") or {})
    return origin_of_model(model.path, revision)


def origin_of_model(path: str | None, revision: str | None) -> dict[str, Any]:
    """`origin_of` a folder or a hub model. revision: the loaded commit of a hub model."""
    if path is None:
        return {}
    if (folder := Path(path).expanduser()).is_dir():
        if (folder / MANIFEST).exists():
            return dict(read_manifest(folder).details.get("origin") or {})
        return {"folder": folder.resolve().name, **license_in(folder / CARD)}
    card = cached_card(path, revision) if HUB_NAME.fullmatch(path) else None
    known = {"base_model": path, "base_revision": revision}
    return {**known, **(license_in(card) if card is not None else {})}
