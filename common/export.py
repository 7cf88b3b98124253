"""From a trained module to an artifact that plain transformers loads, checked by loading it.

Takes the live module, its gathered weights, a tokenizer and what the live model says to a probe (logits of a
policy, scores of a reward model); writes `<folder>.tmp` (safetensors, tokenizer, chat template, generation
config, adapters beside merged weights), loads it back without anything of ours, compares, and only then
writes the manifest and renames. Runs on one rank; neither gathers weights nor changes the live module.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from common.artifacts import (
    Manifest,
    commit_folder,
    disk_errors,
    hash_files,
    read_manifest,
    verify,
    write_manifest,
)
from common.data.chat import template_hash, tokenizer_hash
from common.errors import UserError
from common.models import terminators_of
from common.stage import Role

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("rlhf.export")

ADAPTER_FOLDER = "adapter"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "deepspeed", "peft", "datasets")

EXACT_TOLERANCE = 1e-6
"""fp32 on the CPU, weights untouched: the same kernels on the same numbers, up to their blocking."""

REORDERED_TOLERANCE = 1e-4
"""fp32 with merged adapters, compiled layers or on a GPU: sums in another order, through all layers."""

HALF_TOLERANCE = 5e-2
"""bf16 and fp16: attention kernels round at other places (2^-9 for bf16, at every layer). The tensors
themselves are compared bit for bit, so this only has to catch a wrong config."""


class ExportMismatch(RuntimeError):
    """The reloaded artifact is not the live model. Nothing was committed."""


@dataclass(frozen=True)
class _Probe:
    """Something asked of the live model, to be asked again of the one that is read back."""

    role: Role
    documents: Sequence[torch.Tensor]  # int64 [T] each
    answer: torch.Tensor  # policy: logits [T, V] of the only document; reward model: scores [D]
    unit: float = 0.0  # differences are relative to the largest answer, or to this if it is larger

    def load(self, folder: Path, like: PreTrainedModel) -> PreTrainedModel:
        """The model in `folder`, as anybody would load it."""
        import transformers

        name = "AutoModelForCausalLM" if self.role is Role.policy else "AutoModelForSequenceClassification"
        remote = type(like).__module__.startswith("transformers_modules")
        auto_class: Any = getattr(transformers, name)
        return cast(
            "PreTrainedModel", auto_class.from_pretrained(folder, dtype=like.dtype, trust_remote_code=remote)
        )

    @torch.no_grad()
    def ask(self, model: PreTrainedModel, device: torch.device) -> torch.Tensor:
        """What a plain model answers, to one document after the other."""
        model.eval()
        answers = [model(document[None].to(device), use_cache=False).logits[0] for document in self.documents]
        return torch.cat(answers)


def export_policy(
    module: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    details: Mapping[str, Any],
    probe: torch.Tensor,
    live_logits: torch.Tensor,
) -> Path:
    """Write, check and commit the policy at `folder`; returns `folder`.

    state_dict: the module's full weights (names may carry the "model." of a wrapper), or None to take the
    module's own. probe: int64 [1, N], one document; live_logits: [N, V], what the live model says to it.
    `details` goes into the manifest beside what is known here. An artifact already at `folder` stays when
    it is the same, and is set aside otherwise. Raises ExportMismatch, or UserError for the disk.
    """
    asked = _Probe(Role.policy, [probe[0]], live_logits)
    return _export(module, state_dict, tokenizer, folder, details, asked)


def export_reward_model(
    module: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    details: Mapping[str, Any],
    probe: Sequence[torch.Tensor],
    live_scores: torch.Tensor,
) -> Path:
    """Write, check and commit the reward model at `folder`; returns `folder`.

    module: a sequence classifier with one label, as `scalar_head` makes it. probe: int64 [T] each, documents
    that end where they are scored; live_scores: [D], what the live model gives them. The rest is as for
    `export_policy`.
    """
    config, ends = module.config, terminators_of(tokenizer)
    if config.num_labels != 1 or config.pad_token_id in (None, *ends):
        raise ValueError(
            f"plain transformers would score another token: {config.num_labels} labels, pad "
            f"{config.pad_token_id}, terminators {ends}"
        )
    asked = _Probe(Role.reward_model, probe, live_scores, unit=_head_norm(module, state_dict))
    return _export(module, state_dict, tokenizer, folder, details, asked)


def _head_norm(module: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None) -> float:
    """About how large a score is whose terms do not cancel: hidden states are normalised, to about 1 each."""
    state = _own_names(module, module.state_dict() if state_dict is None else state_dict)
    (head,) = [tensor for name, tensor in state.items() if _base_name(name) == "score.weight"]
    return float(head.float().norm())


def _export(
    module: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    details: Mapping[str, Any],
    probe: _Probe,
) -> Path:
    partial = folder.with_name(folder.name + ".tmp")
    with _disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        saved = _rebuild(module, state_dict, partial)
        _save(saved, module, tokenizer, partial)
        difference = _check(partial, saved, module, probe)
        what = "logit" if probe.role is Role.policy else "score"
        known = _details(saved, tokenizer) | {f"largest_{what}_difference": difference}
        files = hash_files(partial)
        manifest = Manifest("artifact", probe.role, files, {**known, **details})
        if folder.exists() and _is_same(folder, manifest):
            shutil.rmtree(partial)
            return folder
        write_manifest(partial, manifest)
        _set_aside(folder)
        return commit_folder(partial, folder)


# --- Rebuilding: a plain transformers model with the trained weights -------------------------------


def _rebuild(
    module: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None, folder: Path
) -> PreTrainedModel:
    """A second model around the same tensors, on the CPU; adapters are written to disk, then merged."""
    is_adapted = hasattr(module, "peft_config")
    base: PreTrainedModel = cast(Any, module).get_base_model() if is_adapted else module
    state = _own_names(module, module.state_dict() if state_dict is None else state_dict)
    if is_adapted:
        state = {**state, **_dequantized(module)}
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    plain = {_base_name(name): tensor for name, tensor in state.items() if _is_of_base(name)}
    rebuilt = _with_weights(type(base), plain_config(base), plain if is_adapted else state)
    return _merge(module, rebuilt, state, folder) if is_adapted else rebuilt


def plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The model's config without what only training needs."""
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(decoder=True)):
        part._attn_implementation = None
        part.use_cache = True
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = model.dtype
    return config


def _own_names(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` under the module's own names: a wrapper that held it as `model` put that in front."""
    names = set(module.state_dict())
    if names <= set(state):
        return {name: state[name] for name in names}
    stripped = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    lacking = names - set(stripped)
    if lacking:
        raise ValueError(
            f"the state dict lacks {len(lacking)} of the module's tensors: {sorted(lacking)[:3]}"
        )
    return {name: stripped[name] for name in names}


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _is_of_base(name: str) -> bool:
    """Whether the merged model has this tensor: of a head trained beside adapters, peft keeps the old one."""
    return not _is_adapter(name) and ".original_module." not in name


def _base_name(name: str) -> str:
    """The name a tensor has in the model without adapters."""
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return plain.replace(".modules_to_save.default.", ".")


def _dequantized(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """4-bit base weights in the model's dtype; empty without quantization."""
    found = {}
    for name, parameter in module.named_parameters():
        quantized = getattr(parameter, "quant_state", None)
        if quantized is not None:
            import bitsandbytes.functional

            found[name] = bitsandbytes.functional.dequantize_4bit(parameter.data, quantized)
    return found


def _with_weights(
    kind: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """A model of class `kind` holding exactly these tensors, without a copy; its buffers are not made."""
    with torch.device("meta"):
        model = kind(config)
    names = set(model.state_dict())
    lacking = names - set(state)
    if lacking:
        raise ValueError(f"the state dict lacks {len(lacking)} of the model's tensors: {sorted(lacking)[:3]}")
    model.load_state_dict({name: state[name] for name in names}, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _merge(
    module: PreTrainedModel, base: PreTrainedModel, state: dict[str, torch.Tensor], folder: Path
) -> PreTrainedModel:
    """Write the adapters into `folder/adapter` and return the base with them merged in."""
    import peft

    # merging writes into the base's weights, which may be the live model's memory
    for parameter in base.parameters():
        parameter.data = parameter.data.clone()
    base.tie_weights()
    config = copy.deepcopy(cast(Any, module).peft_config["default"])
    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        adapted = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    adapters = {name: tensor for name, tensor in state.items() if _is_adapter(name)}
    unknown = adapted.load_state_dict(adapters, strict=False).unexpected_keys
    expected = {name for name in adapted.state_dict() if _is_adapter(name)}
    if unknown or expected != set(adapters):
        raise ValueError(f"adapters do not fit: {sorted(set(unknown) | (expected ^ set(adapters)))[:3]}")
    adapted.save_pretrained(str(folder / ADAPTER_FOLDER), save_embedding_layers=False)
    return cast("PreTrainedModel", adapted.merge_and_unload(safe_merge=True))


# --- Writing, and reading back ---------------------------------------------------------------------


def _save(
    saved: PreTrainedModel, module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if saved.can_generate():
        saved.generation_config = _generation_config(module, tokenizer)
    saved.save_pretrained(folder)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # else batched generation is damaged
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side = side
    for path in folder.glob("*.safetensors"):  # written for the owner alone, whatever the umask
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


def _check(folder: Path, saved: PreTrainedModel, module: PreTrainedModel, probe: _Probe) -> float:
    """Load the folder as anybody would and compare; the largest difference, relative to the answers."""
    reloaded: Any = probe.load(folder, saved)
    _same_tensors(saved.state_dict(), reloaded.state_dict())
    live = probe.answer.device
    device = _device_with_room(reloaded, live)
    difference = largest_difference(probe.answer, probe.ask(reloaded.to(device), device), probe.unit)
    same_kernels = live.type == "cpu" and not _is_compiled(module)
    exact = same_kernels and not hasattr(module, "peft_config")
    tolerance = _tolerance(saved.dtype, exact=exact)
    if not difference <= tolerance:
        what = "logit" if probe.role is Role.policy else "score"
        raise ExportMismatch(
            f"{folder}: reloaded {what}s differ from the live model's by {difference:.3g} of the largest "
            f"{what} (allowed: {tolerance:g}); the artifact was not committed"
        )
    return difference


def _is_compiled(module: torch.nn.Module) -> bool:
    return any(child._compiled_call_impl is not None for child in module.modules())


def largest_difference(a: torch.Tensor, b: torch.Tensor, unit: float = 0.0) -> float:
    """max |a - b| / max(|a|, unit), in fp32."""
    if a.shape != b.shape:
        raise ExportMismatch(f"live answers have shape {tuple(a.shape)}, reloaded ones {tuple(b.shape)}")
    left, right = a.detach().float().cpu(), b.detach().float().cpu()
    return float((left - right).abs().max() / left.abs().max().clamp_min(max(unit, 1e-30)))


def _tolerance(dtype: torch.dtype, *, exact: bool) -> float:
    if dtype is not torch.float32:
        return HALF_TOLERANCE
    return EXACT_TOLERANCE if exact else REORDERED_TOLERANCE


def _same_tensors(written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> None:
    if set(written) != set(read):
        raise ExportMismatch(f"tensors appeared or vanished: {sorted(set(written) ^ set(read))[:3]}")
    for name, tensor in written.items():
        if tensor.dtype != read[name].dtype or not torch.equal(tensor, read[name].cpu()):
            raise ExportMismatch(f"{name} is not the same after reading it back")


def _device_with_room(model: PreTrainedModel, device: torch.device) -> torch.device:
    """`device`, or the CPU where the training run leaves no room for a second model."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if free > 1.5 * model.get_memory_footprint() else torch.device("cpu")


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
    """Of the program that trained; None where it does not run from a repository."""
    where = Path(__file__).parent
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_same(folder: Path, manifest: Manifest) -> bool:
    """Whether `folder` holds these files, undamaged, for this role. What is said about them may differ."""
    try:
        there = read_manifest(folder)
        if dict(there.files) != dict(manifest.files) or there.role is not manifest.role:
            return False
        verify(folder)
    except UserError:
        return False
    return True


def _set_aside(folder: Path) -> None:
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    log.warning("%s was there already; it is now %s", folder, aside.name)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
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
