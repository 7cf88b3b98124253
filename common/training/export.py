"""From a trained module to an artifact that plain transformers loads, checked by loading it.

Takes the live module, its gathered weights, a tokenizer and what the live model says to a probe (logits of a
policy, scores of a reward model); writes `<folder>.tmp` (safetensors, tokenizer, chat template, generation
config, adapters beside merged weights, a model card), has it checked, and only then writes the manifest and
renames. An artifact that fails the check is committed too, under a name that no step takes: a training is
never thrown away. Runs on one rank; neither gathers weights nor changes the live module.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from common.artifacts import (
    CARD,
    UNVERIFIED,
    Manifest,
    file_record,
    hash_files,
    read_manifest,
    verify,
    write_manifest,
)
from common.card import model_card
from common.data.encoder import template_hash, tokenizer_hash
from common.errors import UserError
from common.files import commit_folder, disk_errors, set_aside
from common.model import attention
from common.model.adapters import base_name, is_of_base, unwrapped
from common.model.packed import PackedModel
from common.model.tokenizer import terminators_of
from common.stage import Role
from common.training.export_check import Probe, check, is_compiled
from common.training.export_model import own_names, rebuild
from common.training.export_stream import Streamed, empty, partial_of, save_config, with_base

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("rlhf.export")

TRIAL_TOKENS = 12
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "deepspeed", "peft", "datasets")


class ExportMismatch(UserError):
    """The artifact differs from the live model. It was committed under another name, which no step takes."""


@torch.no_grad()
def ask_live(module: PackedModel, documents: Sequence[torch.Tensor]) -> Probe:
    """The live model's answers to documents of the run (int64 [T] each; one for a policy).

    The probe's noise is 0 in fp32, where it is not used. On ZeRO-3 all ranks call it.
    """
    base = module.base()
    probe = Probe(module.role, documents, module.answers(documents))
    if base.dtype is torch.float32 or is_compiled(base):  # compiled layers would be compiled once more
        return probe
    with attention.plain_attention(base):
        return replace(probe, noise=probe.difference(probe.ask(base)))


def export_model(
    module: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    probe: Probe,
    *,
    details: Mapping[str, Any],
    say: Callable[[str], None] = log.warning,
    streamed: Streamed | None = None,
) -> Path:
    """Write, check and commit the policy or reward model at `folder`; returns `folder`.

    module: a causal LM, or a sequence classifier with one label. state_dict: its full weights (names may
    carry the "model." of a wrapper), or None to take the module's own. streamed: in place of it, weights that
    lie there already. probe: see `ask_live`; documents of a reward model end where they are scored. `details`
    are added to the manifest. say: shows notes for the user. An artifact already at `folder` stays when it is
    the same, and is set aside otherwise. Raises UserError for the disk, and ExportMismatch when the check
    fails: the artifact is then at `<folder>.unverified`.
    """
    state = own_names(module, state_dict if streamed is None else _read(streamed, folder))
    if probe.role is Role.reward_model:
        config, ends = module.config, terminators_of(tokenizer)
        if config.num_labels != 1 or config.pad_token_id in (None, *ends):
            raise ValueError(
                f"plain transformers would score another token: {config.num_labels} labels, pad "
                f"{config.pad_token_id}, terminators {ends}"
            )
        probe = replace(probe, unit=_head_norm(state))
    partial = partial_of(folder)
    with disk_errors_of_weights(folder), with_base(folder):
        if streamed is None:
            empty(partial)
        rebuilt = rebuild(module, state, partial, None if streamed is None else streamed.merges())
        _save(rebuilt.saved, module, tokenizer, partial, _save_weights if streamed is None else save_config)
        checked = check(partial, rebuilt, module, probe)
        known = {**_details(rebuilt.saved, tokenizer), **checked.figures, **details}
        files = hash_files(partial)
        fault = (streamed and streamed.fault(files)) or checked.fault
        kind, target = "artifact", folder
        for line in checked.notes:
            say(f"note: {line}")
        if fault:
            kind, target = UNVERIFIED, folder.with_name(f"{folder.name}.{UNVERIFIED}")
            known[UNVERIFIED] = fault
        write_card(partial, probe.role, known)
        files[CARD] = file_record(partial / CARD)
        _commit(partial, target, Manifest(kind, probe.role, files, known))
        if fault:
            raise ExportMismatch(
                f"{fault}; what was trained is kept in {target}, and no step takes it from there",
                hint=f"look at it with: python -m pipeline chat {target}; the checkpoints are unharmed",
            )
    return target


def _read(streamed: Streamed, folder: Path) -> Mapping[str, torch.Tensor]:
    with disk_errors(folder):
        if streamed.error is not None:
            raise streamed.error
        return streamed.read()


def write_card(folder: Path, role: Role, details: Mapping[str, Any]) -> None:
    (folder / CARD).write_text(model_card(role, details), encoding="utf-8")


def _head_norm(state: Mapping[str, torch.Tensor]) -> float:
    """About how large a score is whose terms do not cancel: hidden states are normalised, to about 1 each."""
    (head,) = [t for name, t in state.items() if is_of_base(name) and base_name(name) == "score.weight"]
    return float(head.float().norm())


def try_export(module: PreTrainedModel, folder: Path) -> str | None:
    """Export `module` to the empty `folder`, read it back, and return the first fault in words; None without
    one.

    module: a causal LM, or a sequence classifier with one label. Without tokenizer and manifest: for trying
    out on a small model, in fp32, whether a trained one could be exported.
    """
    role = Role.policy if unwrapped(module).get_output_embeddings() is not None else Role.reward_model
    documents, unit = [torch.arange(3, 3 + TRIAL_TOKENS)], float(role is Role.reward_model)
    probe = Probe(role, documents, torch.empty(0), unit=unit)
    with attention.plain_attention(unwrapped(module)):
        probe = replace(probe, answer=probe.ask(module))
    rebuilt = rebuild(module, own_names(module, None), folder)
    _save_weights(rebuilt.saved, folder)
    return check(folder, rebuilt, module, probe).fault


def _commit(partial: Path, folder: Path, manifest: Manifest) -> None:
    if folder.exists() and _is_same(folder, manifest):
        shutil.rmtree(partial)
        return
    write_manifest(partial, manifest)
    if folder.exists():
        log.warning("%s was there already; it is now %s", folder, set_aside(folder).name)
    commit_folder(partial, folder)


# --- Writing ---------------------------------------------------------------------------------------


def _save(
    saved: PreTrainedModel,
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    save_model: Callable[[PreTrainedModel, Path], None],
) -> None:
    if saved.can_generate():
        saved.generation_config = _generation_config(module, tokenizer)
    save_model(saved, folder)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # else batched generation is damaged
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side = side


def _save_weights(saved: PreTrainedModel, folder: Path) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    saved.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):  # written for the owner alone, whatever the umask
        path.chmod((folder / "config.json").stat().st_mode)


def _generation_config(module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """The live model's, stopping at whatever ends a turn. A setting for sampling implies sampling."""
    settings = copy.deepcopy(module.generation_config)
    assert settings is not None
    settings.eos_token_id = sorted({*terminators_of(tokenizer), cast(int, tokenizer.eos_token_id)})
    settings.pad_token_id = tokenizer.pad_token_id
    settings.bos_token_id = tokenizer.bos_token_id
    settings._from_model_config = False  # a generate() of transformers then takes it as it is
    try:
        settings.validate(strict=True)
    except ValueError:  # some published models sample without saying so, and could not be saved again
        settings.do_sample = True
    return settings


# --- The manifest, and what was there before -------------------------------------------------------


def _details(saved: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    config = saved.config.get_text_config(decoder=True)
    return {
        "base_model": saved.config.name_or_path or None,
        "base_revision": getattr(saved.config, "_commit_hash", None),  # of a hub model
        "model_type": saved.config.model_type,
        "parameters": sum(p.numel() for p in saved.parameters()),
        "dtype": str(saved.dtype).removeprefix("torch."),
        "context_length": getattr(config, "max_position_embeddings", None),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "chat_template_hash": template_hash(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "terminators": list(terminators_of(tokenizer)),
        "git_commit": _git_commit(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _git_commit() -> str | None:
    """The git commit of the program that trained; None outside of a repository."""
    command, where = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    found = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_same(folder: Path, manifest: Manifest) -> bool:
    """Whether `folder` holds these files, undamaged, for this role. The manifest's details may differ."""
    try:
        there = read_manifest(folder)
        if dict(there.files) != dict(manifest.files) or there.role is not manifest.role:
            return False
        verify(folder)
    except UserError:
        return False
    return True


@contextmanager
def disk_errors_of_weights(folder: Path) -> Iterator[None]:
    """A full disk is an OSError, or a SafetensorError with the same in its text."""
    from safetensors import SafetensorError

    with disk_errors(folder):
        try:
            yield
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), str(error)) from error
