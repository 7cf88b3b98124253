"""From a trained module to an artifact that plain transformers loads, checked by loading it.

Takes the live module, its gathered weights, a tokenizer and what the live model says to a probe (logits of a
policy, scores of a reward model); writes `<folder>.tmp` (safetensors, tokenizer, chat template, generation
config, adapters beside merged weights), loads it back without anything of ours, compares, and only then
writes the manifest and renames. What fails the comparison is committed too, under a name that no step takes:
a training is never thrown away. Runs on one rank; neither gathers weights nor changes the live module.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from common.artifacts import UNVERIFIED, Manifest, hash_files, read_manifest, verify, write_manifest
from common.data.encoder import template_hash, tokenizer_hash
from common.errors import UserError
from common.files import commit_folder, disk_errors, set_aside
from common.model import attention
from common.model.adapters import (
    ADAPTER,
    MERGE_TOLERANCE,
    base_name,
    is_adapter,
    is_of_base,
    merged_weights,
    unwrapped,
)
from common.model.one_by_one import reason_of, run_one_by_one
from common.model.packed import PackedCausalLM
from common.model.scalar_head import PackedScalarModel
from common.model.tokenizer import terminators_of
from common.stage import Role

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("rlhf.export")

ADAPTER_FOLDER = "adapter"
TRIAL_TOKENS = 12
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "deepspeed", "peft", "datasets")

EXACT_TOLERANCE = 1e-6
"""fp32 on the CPU, weights untouched: the same kernels on the same numbers, up to their blocking."""

REORDERED_TOLERANCE = 1e-4
"""fp32 with merged adapters, compiled layers or on a GPU: sums in another order, through all layers."""

NOISE_FACTOR, LEAST_DIFFERENCE = 4.0, 2e-2
"""bf16 and fp16: how far the typical difference may be above the live model's noise, which is the difference
between its two attention kernels; and what is always allowed. The dtype rounds to 2^-9, at every layer."""


class ExportMismatch(UserError):
    """What was written is not the live model. It was committed under another name, which no step takes."""


@dataclass(frozen=True)
class _Probe:
    """Something asked of the live model, to be asked again of the one that is read back."""

    role: Role
    documents: Sequence[torch.Tensor]  # int64 [T] each
    answer: torch.Tensor  # policy: logits [T, V] of the only document; reward model: scores [D]
    noise: float = 0.0  # of the live model, as `noise_of` measures it
    unit: float = 0.0  # differences are relative to the largest answer, or to this if it is larger

    @property
    def what(self) -> str:
        """What an answer consists of, in words."""
        return "logit" if self.role is Role.policy else "score"

    def load(self, folder: Path, like: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        """The model in `folder`, as anybody would load it."""
        import transformers

        name = "AutoModelForCausalLM" if self.role is Role.policy else "AutoModelForSequenceClassification"
        remote = type(like).__module__.startswith("transformers_modules")
        auto_class: Any = getattr(transformers, name)
        return cast(
            "PreTrainedModel", auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=remote)
        )

    @torch.no_grad()
    def ask(self, model: PreTrainedModel) -> torch.Tensor:
        """What a plain model answers, on the live model's device or its own, to one document at a time."""
        device = _move(model, self.answer.device)
        model.eval()
        answers = [model(document[None].to(device), use_cache=False).logits[0] for document in self.documents]
        return torch.cat(answers)

    @torch.no_grad()
    def ask_as_live(self, model: nn.Module, live: PreTrainedModel) -> torch.Tensor:
        """What a model answers with the attention of `live`; peft's wrapper may be around `model`."""
        device = _move(model, self.answer.device)
        model.eval()
        documents = [document.to(device) for document in self.documents]
        unwrapped(model).set_attn_implementation(live.config._attn_implementation)
        if (reason := reason_of(live)) is not None:
            run_one_by_one(unwrapped(model), reason)
        if self.role is Role.policy:
            return PackedCausalLM(model).logits(documents[0][None])
        return PackedScalarModel(model).scores(documents)

    def difference(self, answer: torch.Tensor) -> float:
        """The typical difference of another answer from the live model's, relative to the live one's size.

        Policy: the median over positions of |a - b| / |a|, of logits without their mean. Reward model: the
        mean difference of scores. A few tokens that rounding sends to another expert do not count.
        """
        if answer.shape != self.answer.shape:
            return math.inf
        live, other = _in_fp32(self.answer), _in_fp32(answer)
        if self.role is Role.reward_model:
            return float((live - other).abs().mean() / live.abs().max().clamp_min(max(self.unit, 1e-30)))
        live, other = live - live.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
        return float(((live - other).norm(dim=-1) / live.norm(dim=-1).clamp_min(1e-30)).median())

    def kl(self, answer: torch.Tensor) -> float:
        """Mean over positions of the KL of another answer from the live policy's, in nats."""
        live, other = (_in_fp32(logits).log_softmax(-1) for logits in (self.answer, answer))
        return float((live.exp() * (live - other)).sum(-1).mean())

    @property
    def allowed(self) -> float:
        """The largest `difference` that rounding explains."""
        return max(NOISE_FACTOR * self.noise, LEAST_DIFFERENCE)


@torch.no_grad()
def noise_of(
    module: PackedCausalLM | PackedScalarModel, documents: Sequence[torch.Tensor], answer: torch.Tensor
) -> float:
    """How much the live model's answer differs between its own two attention kernels: `_Probe.difference`.

    0 in fp32, where nothing is judged by it. documents: int64 [T] each, one for a policy; answer: what the
    module says to them. On ZeRO-3 all ranks call it.
    """
    base = module.base()
    if base.dtype is torch.float32 or _is_compiled(base):  # compiled layers would be compiled once more
        return 0.0
    role = Role.policy if isinstance(module, PackedCausalLM) else Role.reward_model
    asked = _Probe(role, documents, answer)
    with attention.plain_attention(base):
        return asked.difference(asked.ask(base))


def export_policy(
    module: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    details: Mapping[str, Any],
    probe: torch.Tensor,
    live_logits: torch.Tensor,
    noise: float = 0.0,
    say: Callable[[str], None] = log.warning,
) -> Path:
    """Write, check and commit the policy at `folder`; returns `folder`.

    state_dict: the module's full weights (names may carry the "model." of a wrapper), or None to take the
    module's own. probe: int64 [1, N], one document, text of the run; live_logits: [N, V], what the live model
    says to it; noise: see `noise_of`. `details` goes into the manifest beside what is known here. say: hears
    what the user should know. An artifact already at `folder` stays when it is the same, and is set aside
    otherwise. Raises UserError for the disk, and ExportMismatch when the check fails: the artifact is then at
    `<folder>.unverified`.
    """
    asked = _Probe(Role.policy, [probe[0]], live_logits, noise)
    return _export(module, state_dict, tokenizer, folder, details, asked, say)


def export_reward_model(
    module: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    details: Mapping[str, Any],
    probe: Sequence[torch.Tensor],
    live_scores: torch.Tensor,
    noise: float = 0.0,
    say: Callable[[str], None] = log.warning,
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
    asked = _Probe(Role.reward_model, probe, live_scores, noise, unit=_head_norm(module, state_dict))
    return _export(module, state_dict, tokenizer, folder, details, asked, say)


def _head_norm(module: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None) -> float:
    """About how large a score is whose terms do not cancel: hidden states are normalised, to about 1 each."""
    state = _own_names(module, module.state_dict() if state_dict is None else state_dict)
    (head,) = [t for name, t in state.items() if is_of_base(name) and base_name(name) == "score.weight"]
    return float(head.float().norm())


def _export(
    module: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    details: Mapping[str, Any],
    probe: _Probe,
    say: Callable[[str], None],
) -> Path:
    partial = folder.with_name(folder.name + ".tmp")
    with _disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        rebuilt = _rebuild(module, state_dict, partial)
        _save(rebuilt.saved, module, tokenizer, partial)
        checked = _check(partial, rebuilt, module, probe)
        known = {**_details(rebuilt.saved, tokenizer), **checked.figures, **details}
        kind, target = "artifact", folder
        for line in checked.notes:
            say(f"note: {line}")
        if checked.fault:
            kind, target = UNVERIFIED, folder.with_name(f"{folder.name}.{UNVERIFIED}")
            known[UNVERIFIED] = checked.fault
        _commit(partial, target, Manifest(kind, probe.role, hash_files(partial), known))
        if checked.fault:
            raise ExportMismatch(
                f"{checked.fault}; what was trained is kept in {target}, and no step takes it from there",
                hint=f"look at it with: python -m pipeline chat {target}; the checkpoints are unharmed",
            )
    return target


def try_export(module: PreTrainedModel, folder: Path) -> str | None:
    """What is wrong with what is read back of `module` from the empty `folder`, in words; None if nothing is.

    module: a causal LM, or a sequence classifier with one label. Without tokenizer and manifest: for trying
    out on a small model, in fp32, whether a trained one could be exported.
    """
    role = Role.policy if unwrapped(module).get_output_embeddings() is not None else Role.reward_model
    probe = _Probe(
        role, [torch.arange(3, 3 + TRIAL_TOKENS)], torch.empty(0), unit=float(role is Role.reward_model)
    )
    with attention.plain_attention(unwrapped(module)):
        probe = replace(probe, answer=probe.ask(module))
    rebuilt = _rebuild(module, None, folder)
    _save_weights(rebuilt.saved, folder)
    return _check(folder, rebuilt, module, probe).fault


def _commit(partial: Path, folder: Path, manifest: Manifest) -> None:
    if folder.exists() and _is_same(folder, manifest):
        shutil.rmtree(partial)
        return
    write_manifest(partial, manifest)
    if folder.exists():
        log.warning("%s was there already; it is now %s", folder, set_aside(folder).name)
    commit_folder(partial, folder)


# --- Rebuilding: a plain transformers model with the trained weights -------------------------------


@dataclass(frozen=True)
class _Rebuilt:
    """What is written, and what it was made from."""

    saved: PreTrainedModel  # on the CPU; tensors that nothing was merged into are the given ones
    adapted: PreTrainedModel | None = None  # the base with its adapters beside it; None without adapters
    merge_differences: Mapping[str, float] = field(default_factory=dict)  # by tensor: see `merged_weights`


def _rebuild(
    module: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None, folder: Path
) -> _Rebuilt:
    """A second model around the same tensors; adapters are written to disk, then merged."""
    is_adapted = hasattr(module, "peft_config")
    base = unwrapped(module)
    state = _own_names(module, module.state_dict() if state_dict is None else state_dict)
    if is_adapted:
        state = {**state, **_dequantized(module)}
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    if not is_adapted:
        return _Rebuilt(_with_weights(type(base), plain_config(base), state))
    plain = {base_name(name): tensor for name, tensor in state.items() if is_of_base(name)}
    beside = _with_weights(type(base), plain_config(base), plain, runs=True)
    tied = _tied_names(beside)
    adapted = _with_adapters(module, beside, state)
    cast(Any, adapted).save_pretrained(str(folder / ADAPTER_FOLDER), save_embedding_layers=False)
    config, differences = plain_config(base), {}
    for name, merged, difference in merged_weights(adapted):
        differences[name] = difference
        plain[name] = merged.to(plain[name].dtype)  # the only rounding
    if tied & set(differences):  # what was one tensor is two now
        _set_tied(config, False)
    return _Rebuilt(_with_weights(type(base), config, plain), adapted, differences)


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
    kind: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: Mapping[str, torch.Tensor],
    *,
    runs: bool = False,
) -> PreTrainedModel:
    """A model of class `kind` holding exactly these tensors, without a copy; runs: with its buffers too."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False) if runs else torch.device("meta"):
        model = kind(config)
    names = set(model.state_dict())
    lacking = names - set(state)
    if lacking:
        raise ValueError(f"the state dict lacks {len(lacking)} of the model's tensors: {sorted(lacking)[:3]}")
    model.load_state_dict({name: state[name] for name in names}, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _with_adapters(
    module: PreTrainedModel, base: PreTrainedModel, state: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """`base`, with the module's adapters and their weights in `state` around it."""
    import peft

    config = copy.deepcopy(cast(Any, module).peft_config[ADAPTER])
    config.inference_mode = False
    with torch.random.fork_rng(devices=[]):
        adapted = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    adapters = {name: tensor for name, tensor in state.items() if is_adapter(name)}
    unknown = adapted.load_state_dict(adapters, strict=False).unexpected_keys
    expected = {name for name in adapted.state_dict() if is_adapter(name)}
    if unknown or expected != set(adapters):
        raise ValueError(f"adapters do not fit: {sorted(set(unknown) | (expected ^ set(adapters)))[:3]}")
    return cast("PreTrainedModel", adapted)


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Tensors that are one, by the model's config."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied, *tied.values()}


def _set_tied(config: PreTrainedConfig, tied: bool) -> None:
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = tied


# --- Writing, and reading back ---------------------------------------------------------------------


def _save(
    saved: PreTrainedModel, module: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    if saved.can_generate():
        saved.generation_config = _generation_config(module, tokenizer)
    _save_weights(saved, folder)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"  # else batched generation is damaged
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side = side


def _save_weights(saved: PreTrainedModel, folder: Path) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    saved.save_pretrained(folder)
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


# --- Checking: each link from the live model to what plain transformers reads ----------------------


@dataclass(frozen=True)
class _Checked:
    """What a check found; fault: the first thing that is wrong, in words."""

    figures: Mapping[str, float | None]
    fault: str | None
    notes: Sequence[str] = ()


def _check(folder: Path, rebuilt: _Rebuilt, module: PreTrainedModel, probe: _Probe) -> _Checked:
    """Load the folder as anybody would and compare.

    Rounding hides little in fp32, so answers are compared by their largest difference. In bf16 and fp16 it
    hides more than a wrong merge or config would change. There every link has a test of its own: the merge,
    layer by layer in fp32; the tensors, bit for bit; the live model's answer against that of the same
    tensors, by the typical difference; and the config and class that were read back against the live ones, in
    fp32.
    """
    saved, what = rebuilt.saved, probe.what
    reloaded = probe.load(folder, saved, saved.dtype)
    faults = [
        *_merge_faults(rebuilt.merge_differences),
        *_tensor_faults(saved.state_dict(), reloaded.state_dict()),
    ]
    answer = probe.ask(reloaded)
    largest = largest_difference(probe.answer, answer, probe.unit)
    figures: dict[str, float | None] = {f"largest_{what}_difference": largest}
    if rebuilt.merge_differences:
        figures["largest_merge_difference"] = max(rebuilt.merge_differences.values())
    if saved.dtype is torch.float32:
        same_kernels = probe.answer.device.type == "cpu" and not _is_compiled(module)
        exact = same_kernels and rebuilt.adapted is None
        faults += _answer_faults(largest, EXACT_TOLERANCE if exact else REORDERED_TOLERANCE, what)
        return _Checked(figures, next(iter(faults), None))
    figures[f"typical_{what}_difference"] = typical = probe.difference(answer)
    figures[f"typical_{what}_noise"] = probe.noise
    if probe.role is Role.policy and largest < math.inf:
        figures["mean_kl"] = probe.kl(answer)
    beside = (
        typical
        if rebuilt.adapted is None
        else probe.difference(probe.ask_as_live(rebuilt.adapted, unwrapped(module)))
    )
    faults += _answer_faults(beside, probe.allowed, what, "typically")
    del reloaded
    in_fp32 = _difference_in_fp32(folder, saved, unwrapped(module), probe)
    figures[f"largest_{what}_difference_fp32"] = in_fp32
    notes = []
    if in_fp32 is None:
        notes.append("the export was not compared in fp32, which takes more memory than there is")
    else:
        faults += _answer_faults(in_fp32, REORDERED_TOLERANCE, what, "in fp32")
    if rebuilt.adapted is not None and typical > probe.allowed:
        notes.append(
            f"merged weights, rounded to {saved.dtype}, give {what}s that differ from the trained ones by "
            f"{typical:.3g} of their size (noise: {probe.noise:.3g}); {ADAPTER_FOLDER}/ in the export holds "
            "the adapters as they were trained"
        )
    return _Checked(figures, next(iter(faults), None), notes)


def _merge_faults(differences: Mapping[str, float]) -> Iterator[str]:
    for name, difference in differences.items():
        if not difference <= MERGE_TOLERANCE:
            yield (
                f"{name} is not the merge of its adapter: outputs differ by {difference:.3g} of the largest "
                f"(allowed: {MERGE_TOLERANCE:g})"
            )


def _tensor_faults(written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if set(written) != set(read):
        yield f"tensors appeared or vanished: {sorted(set(written) ^ set(read))[:3]}"
        return
    for name, tensor in written.items():
        if tensor.dtype != read[name].dtype or not torch.equal(tensor, read[name].cpu()):
            yield f"{name} is not the same after reading it back"


def _answer_faults(difference: float, allowed: float, what: str, how: str = "") -> Iterator[str]:
    if not difference <= allowed:
        yield (
            f"reloaded {what}s differ from the live model's{how and ' ' + how} by {difference:.3g} "
            f"(allowed: {allowed:.3g})"
        )


def _difference_in_fp32(
    folder: Path, saved: PreTrainedModel, live: PreTrainedModel, probe: _Probe
) -> float | None:
    """Between what is read back as fp32, and the live model's class and config around the same tensors; None
    where there is no memory for them."""
    if _free_memory() < 2 * sum(4 * tensor.numel() for tensor in saved.state_dict().values()):
        return None
    reloaded = probe.load(folder, saved, torch.float32)  # also its buffers: in half they were rounded
    config = copy.deepcopy(live.config)
    config.dtype = torch.float32
    _set_tied(config, bool(saved.config.get_text_config(decoder=True).tie_word_embeddings))
    twin = _with_weights(type(live), config, reloaded.state_dict(), runs=True)
    return largest_difference(probe.ask_as_live(twin, live), probe.ask(reloaded), probe.unit)


def _free_memory() -> int:
    """Bytes of the machine's memory that can be had."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0


def _is_compiled(module: nn.Module) -> bool:
    return any(child._compiled_call_impl is not None for child in module.modules())


def largest_difference(a: torch.Tensor, b: torch.Tensor, unit: float = 0.0) -> float:
    """max |a - b| / max(|a|, unit), in fp32; infinite for another shape."""
    if a.shape != b.shape:
        return math.inf
    left, right = _in_fp32(a), _in_fp32(b)
    return float((left - right).abs().max() / left.abs().max().clamp_min(max(unit, 1e-30)))


def _in_fp32(answer: torch.Tensor) -> torch.Tensor:
    return answer.detach().float().cpu()


def _move(model: nn.Module, device: torch.device) -> torch.device:
    """Move to `device`, or to the CPU where the training run leaves no room for a second model; to where."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        needed = sum(p.numel() * p.element_size() for p in model.parameters() if p.device != device)
        device = device if free > 1.5 * needed else torch.device("cpu")
    model.to(device)
    return device


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
