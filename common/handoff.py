"""How one step's artifact becomes the next one's start.

Takes artifacts on disk and settings; returns settings, records for a manifest, or a UserError that says what
does not fit. Reads manifests and hashes files; loads neither weights nor tokenizers, and imports no torch:
the controller asks here before anything is started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.artifacts import MANIFEST, Artifact, file_sha256, read_json, read_manifest
from common.config import ModelConfig, TokenizerConfig
from common.errors import UserError
from common.stage import Input, Role
from common.text import nearest

TAKEN_FROM = "taken_from.json"
"""In a step's folder that was laid out to export one checkpoint: the `TakenFrom` of the run it is of."""
TOKEN_FIELDS = {
    "tokenizer_hash": "tokenizer",
    "chat_template_hash": "chat template",
    "bos_token_id": "bos id",
    "eos_token_id": "eos id",
    "pad_token_id": "pad id",
    "terminators": "terminator ids",
}
"""What of a manifest's details decides how text becomes tokens and where a turn ends; its name in words."""

PAD = "pad_token_id"
"""Of a published reward model's own config: transformers reads its score at the last token that is no pad."""


@dataclasses.dataclass(frozen=True)
class TakenFrom:
    """What the record of an exported checkpoint says of its run, where the export's own settings differ.

    ended: whether the step had ended. resolved_config_hash: of the run's resolved.yaml. settings: by key.
    """

    ended: bool
    resolved_config_hash: str
    settings: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TakenFrom | None:
        """Of a step's folder; None for the run itself."""
        path = folder / TAKEN_FROM
        return cls(**read_json(path)) if path.exists() else None


def scores_text(artifact: Artifact) -> bool:
    """Whether it is a reward model that others published: it is given responses as text, which it reads with
    its own tokenizer and chat template. Ours are given the policy's tokens."""
    return artifact.manifest.role is Role.reward_model and "imported" in artifact.manifest.details


def model_of(model: ModelConfig, policy: Path) -> ModelConfig:
    """`model` with the weights, tokenizer and chat template of the artifact at `policy`.

    dtype, adapters, checkpointing and compilation stay the job's own.
    """
    return dataclasses.replace(
        model, path=str(policy), revision=None, config={}, tokenizer=TokenizerConfig(), chat_template=None
    )


def model_to_preview(model: ModelConfig, policy: str | None, key: str) -> ModelConfig:
    """The model whose tokenizer a step's preview reads rows with: the policy's, named with `key`.

    Without a policy (no step has made it yet) it is `model` itself, as the controller has prepared it.
    """
    return model if policy is None else model_of(model, load_named(policy, Role.policy, key).path)


def parent_record(artifact: Path, run_dir: Path, taken: Input | None = None) -> dict[str, Any]:
    """What the manifest of a child says of the artifact it was made from: role, path, hash of the manifest,
    what it was taken as (where that is not its role), and of a model that others published where it is from
    and the hashes of its weights.

    The path is relative to the run's folder for an artifact inside of it, so that a run can be moved.
    """
    folder, run = artifact.resolve(), run_dir.resolve()
    path = folder.relative_to(run).as_posix() if folder.is_relative_to(run) else str(folder)
    manifest = read_manifest(folder)
    record = {"role": manifest.role, "path": path, "manifest_sha256": file_sha256(folder / MANIFEST)}
    if taken is not None and taken.value != taken.role.value:
        record["taken_as"] = taken.value
    imported = manifest.details.get("imported")
    return record if imported is None else {**record, "imported": imported}


def input_of(parent: Mapping[str, Any]) -> str:
    """What an artifact was taken as, of its `parent_record`."""
    return str(parent.get("taken_as", parent["role"]))


def load_named(path: str, role: Role, key: str, *, allow_unverified: bool = False) -> Artifact:
    """The artifact that the user named with `key=path`, every file re-hashed.

    UserError naming key and path when there is none, when it is unfinished or damaged, or has another role.
    allow_unverified: as in `Artifact.load`.
    """
    folder = Path(path)
    if not path:
        raise UserError(f"{key} is empty", hint=f"{key}=FOLDER of a {role.value} artifact, or leave it out")
    check_is_artifact(path, role, key)
    try:
        return Artifact.load(folder, role, allow_unverified=allow_unverified)
    except UserError as error:
        what = error.message.removeprefix(f"{folder} ")  # the path is said already
        raise UserError(f"{key}={path}: {what}", hint=error.hint) from error


def check_same_tokens(left: Artifact, right: Artifact) -> None:
    """UserError naming both artifacts and each field in which they read text differently.

    None of it matters where one of them is given text.
    """
    if scores_text(left) or scores_text(right):
        return
    ours, theirs = left.manifest.details, right.manifest.details
    differing = [
        f"\n    {words}: {_shown(ours.get(name))} against {_shown(theirs.get(name))}"
        for name, words in TOKEN_FIELDS.items()
        if name not in ours or name not in theirs or ours[name] != theirs[name]
    ]
    if differing:
        raise UserError(
            f"{_named(left)} and {_named(right)} do not read text alike:{''.join(differing)}",
            hint="both must come from the same base model, with its tokenizer and chat template unchanged",
        )


def similar(place: Path) -> str:
    """The way out for a path that is not there: the most similar name beside it, or where we looked."""
    if str(place).startswith("~"):
        return f"~ is not expanded here; write {place.expanduser()}"
    if not place.parent.is_dir():
        return f"there is no folder {place.parent} either (working directory: {Path.cwd()})"
    otherwise = f"nothing in {place.parent} has a similar name (working directory: {Path.cwd()})"
    near = nearest(place.name, (other.name for other in place.parent.iterdir()))
    return f"did you mean {place.parent / near[0]}?" if near else otherwise


def check_is_artifact(path: str, role: Role, key: str) -> None:
    """UserError in the user's terms for a path that is no folder with a manifest; hashes nothing."""
    folder, named = Path(path), f"{key}={path}"
    if not folder.exists():
        raise UserError(f"{named}: no such folder", hint=similar(folder))
    if not folder.is_dir():
        raise UserError(f"{named} is a file, not a folder", hint=f"{key}={folder.parent}")
    if (folder / MANIFEST).exists():
        return
    manifests = [*folder.glob("export/" + MANIFEST), *sorted(folder.glob("*/export/" + MANIFEST))]
    others = {manifest.parent: _role_of(manifest.parent) for manifest in manifests}
    held = ", ".join(f"a {other.value} ({export})" for export, other in others.items() if other is not None)
    if held:
        raise UserError(
            f"{named} holds {held}, where a {role.value} is needed",
            hint=f"name the export/ folder of a step that produces a {role.value}",
        )
    if _role_of(folder.parent) is role:
        raise UserError(
            f"{named} is a part of the artifact {folder.parent}, not all of it",
            hint=f"name the folder above: {key}={folder.parent}",
        )
    raise UserError(
        f"{named} is not a finished artifact: it has no {MANIFEST}",
        hint="the manifest is written last: let the step that makes it finish, or name another folder",
    )


def _role_of(folder: Path) -> Role | None:
    try:
        return read_manifest(folder).role
    except UserError:
        return None


def _named(artifact: Artifact) -> str:
    role = artifact.manifest.role
    return f"{artifact.path} ({'no role' if role is None else role.value})"


def _shown(value: Any) -> str:
    """A value of a manifest in short: hashes by their beginning."""
    if value is None:
        return "none"
    return value[:12] if isinstance(value, str) else str(value)
