"""Whether an exported model is the live one: each link from the live model to what plain transformers reads.

Takes a folder, what was written there and a probe: what the live model says to documents (logits of a policy,
scores of a reward model). Loads the folder without anything of ours, asks it the same, and returns the first
fault in words, figures for the manifest and notes for the user. Writes nothing.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from common.model.adapters import MERGE_TOLERANCE, unwrapped
from common.model.one_by_one import reason_of, run_one_by_one
from common.model.packed import PackedCausalLM
from common.model.probes import Shortcuts
from common.model.scalar_head import PackedScalarModel
from common.stage import Role
from common.training.export_model import ADAPTER_FOLDER, Rebuilt, set_tied, with_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("rlhf.export")

EXACT_TOLERANCE = 1e-6
"""fp32 on the CPU, weights untouched: the same kernels on the same numbers, up to their blocking."""

REORDERED_TOLERANCE = 1e-4
"""fp32 with merged adapters, compiled layers or on a GPU: sums in another order, through all layers."""

NOISE_FACTOR, LEAST_DIFFERENCE = 4.0, 2e-2
"""bf16 and fp16: how far the typical difference may be above the live model's noise, which is the difference
between its two attention kernels; and what is always allowed. The dtype rounds to 2^-9, at every layer."""


@dataclass(frozen=True)
class Probe:
    """Documents and the live model's answers to them, to compare with the model that is read back."""

    role: Role
    documents: Sequence[torch.Tensor]  # int64 [T] each
    answer: torch.Tensor  # policy: logits [T, V] of the only document; reward model: scores [D]
    noise: float = 0.0  # of the live model: by how much its answer differs between its two attention kernels
    unit: float = 0.0  # differences are relative to the largest answer, or to this if it is larger

    @property
    def what(self) -> str:
        """The unit of an answer, in words."""
        return "logit" if self.role is Role.policy else "score"

    def load(self, folder: Path, like: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        """The model in `folder`, as anybody would load it."""
        import transformers

        name = "AutoModelForCausalLM" if self.role is Role.policy else "AutoModelForSequenceClassification"
        remote = type(like).__module__.startswith("transformers_modules")
        auto_class: Any = getattr(transformers, name)
        model = auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=remote)
        return cast("PreTrainedModel", model)

    @torch.no_grad()
    def ask(self, model: PreTrainedModel) -> torch.Tensor:
        """A plain model's answers, one document at a time, on the live model's device or its own."""
        device = _move(model, self.answer.device)
        model.eval()
        answers = [model(document[None].to(device), use_cache=False).logits[0] for document in self.documents]
        return torch.cat(answers)

    @torch.no_grad()
    def ask_as_live(self, model: nn.Module, live: PreTrainedModel) -> torch.Tensor:
        """A model's answers with the attention of `live`; `model` may be in peft's wrapper."""
        device = _move(model, self.answer.device)
        model.eval()
        documents = [document.to(device) for document in self.documents]
        unwrapped(model).set_attn_implementation(live.config._attn_implementation)
        if (reason := reason_of(live)) is not None:
            run_one_by_one(unwrapped(model), reason)
        packed = PackedCausalLM if self.role is Role.policy else PackedScalarModel
        return packed(model, Shortcuts()).answers(documents)

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


@dataclass(frozen=True)
class Checked:
    """The result of a check. fault: the first one, in words."""

    figures: Mapping[str, float | None]
    fault: str | None
    notes: Sequence[str] = ()


def check(folder: Path, rebuilt: Rebuilt, module: PreTrainedModel, probe: Probe) -> Checked:
    """Load the folder as anybody would and compare.

    In fp32 rounding is small, so answers are compared by their largest difference. In bf16 and fp16 rounding
    is larger than the effect of a wrong merge or config. There every link has a test of its own: the merge,
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
        same_kernels = probe.answer.device.type == "cpu" and not is_compiled(module)
        exact = same_kernels and rebuilt.adapted is None
        faults += _answer_faults(largest, EXACT_TOLERANCE if exact else REORDERED_TOLERANCE, what)
        return Checked(figures, next(iter(faults), None))
    figures[f"typical_{what}_difference"] = typical = probe.difference(answer)
    figures[f"typical_{what}_noise"] = probe.noise
    if probe.role is Role.policy and largest < math.inf:
        figures["mean_kl"] = probe.kl(answer)
    unrounded = typical  # rounding of merged weights is only noted, below
    if rebuilt.adapted is not None:
        unrounded = probe.difference(probe.ask_as_live(rebuilt.adapted, unwrapped(module)))
    faults += _answer_faults(unrounded, probe.allowed, what, "typically")
    del reloaded
    in_fp32 = _difference_in_fp32(folder, saved, unwrapped(module), probe)
    figures[f"largest_{what}_difference_fp32"] = in_fp32
    notes: list[str] = []
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
    return Checked(figures, next(iter(faults), None), notes)


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
    folder: Path, saved: PreTrainedModel, live: PreTrainedModel, probe: Probe
) -> float | None:
    """Largest difference between the model read back as fp32 and the live model's class and config around the
    same tensors; where there is no memory for them, each module is in fp32 while it runs. None where its
    code does not let it."""
    config = copy.deepcopy(live.config)
    config.dtype = torch.float32
    set_tied(config, bool(saved.config.get_text_config(decoder=True).tie_word_embeddings))
    fits = _free_memory() >= 2 * sum(4 * tensor.numel() for tensor in saved.state_dict().values())
    # in fp32 also its buffers: in half they were rounded
    reloaded = probe.load(folder, saved, torch.float32 if fits else saved.dtype)
    twin = with_weights(type(live), config, reloaded.state_dict(), runs=True)
    if fits:
        return largest_difference(probe.ask_as_live(twin, live), probe.ask(reloaded), probe.unit)
    plain = copy.deepcopy(reloaded.config)
    plain.dtype = torch.float32
    reloaded = with_weights(type(reloaded), plain, reloaded.state_dict(), runs=True)
    try:
        with module_by_module(reloaded), module_by_module(twin):
            return largest_difference(probe.ask_as_live(twin, live), probe.ask(reloaded), probe.unit)
    except RuntimeError as error:  # a module that computes with the weights of another
        log.info("the export does not run module by module: %r", error)
        return None


@contextmanager
def module_by_module(model: nn.Module) -> Iterator[None]:
    """A module's own weights are in fp32 while it is called; between its calls they stay as they were."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    handles = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        stored = [parameter.data for parameter in own]

        def widen(*_: Any, own: list[nn.Parameter] = own) -> None:
            for parameter in own:
                parameter.data = parameter.data.float()

        def restore(*_: Any, own: list[nn.Parameter] = own, stored: list[torch.Tensor] = stored) -> None:
            for parameter, tensor in zip(own, stored, strict=True):
                parameter.data = tensor

        if own:
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _free_memory() -> int:
    """Bytes of the machine's free memory."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0


def is_compiled(module: nn.Module) -> bool:
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
    """Move to `device`, or to the CPU where the training run leaves no room for a second model; returns
    where."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        needed = sum(p.numel() * p.element_size() for p in model.parameters() if p.device != device)
        device = device if free > 1.5 * needed else torch.device("cpu")
    model.to(device)
    return device
