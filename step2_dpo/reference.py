"""What the reference says of every pair: log π_ref of both answers, computed once and kept.

The reference is the starting policy, asked through the engine before anything was trained or restored (with
adapters, with them switched off), or another model that the user named. Takes the batches of the whole run;
returns one number per answer, in float64. Each pair is computed in the micro-batch in which training first
sees it, so that at step 0 a policy that is its own reference gives the same bits. A pair that stands twice in
one step (its source weighs more than 1) has one number for both places: it is exact in the first, and in the
other only if the same bits come out there. The numbers lie in the cache under a key of all that decides them,
first of all the hash of the weights, so that nothing here needs the reference again, nor the memory for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from common.artifacts import Artifact, content_sha256
from common.config import JobConfig, ModelConfig, Quantize
from common.data import batches as batches_module
from common.data import packing, slices
from common.data.batches import BatchPlan, PairBatches, evaluation_pair_batches
from common.data.types import PairBatch
from common.files import disk_errors, write_atomically
from common.model import (
    adapters,
    architecture,
    attention,
    efficient_attention,
    flash_attention,
    fused_loss,
    hub,
    last_layer,
    loading,
    loss_kernel,
    miniature,
    nf4,
    one_by_one,
    packed,
    partition,
    probes,
    recomputation,
    sequence,
    tiled_mlp,
    tokenizer,
)
from common.model.adapters import adapters_off
from common.model.packed import PackedCausalLM, TokenLoss, batch_arguments
from common.model.sequence import reads_of_group
from common.runtime.distributed import World, all_gather_arrays, broadcast_from_rank0
from common.training import frozen
from common.training.engine import Engine
from common.training.frozen import load_frozen_policy
from step2_dpo import loss
from step2_dpo.loss import ChosenRejected, answer_sums

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from common.data.stored import PairDataset

HASHED = (
    adapters, architecture, attention, efficient_attention, flash_attention, fused_loss, hub, last_layer,
    loading, loss_kernel, miniature, nf4, one_by_one, packed, partition, probes, recomputation, sequence,
    slices, tiled_mlp, tokenizer, frozen, batches_module, packing, loss,
)  # fmt: skip
"""The modules that load the model, lay out the pairs and compute the numbers."""

PROGRESS_SECONDS = 10.0
"""Between two lines of progress."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """log π_ref, float64 [pairs, 2], chosen and rejected; NaN for pairs that the run never sees.

    record: name and hash of the file that holds them in the cache, for the manifest.
    """

    train: np.ndarray
    held_out: np.ndarray
    record: Mapping[str, str] = field(default_factory=dict)

    def of_train(self, batch: PairBatch) -> ChosenRejected:
        """Of a training batch's pairs, in its order."""
        return _answers(self.train, batch)

    def of_held_out(self, batch: PairBatch) -> ChosenRejected:
        """Of a held-out batch's pairs, in its order."""
        return _answers(self.held_out, batch)


def _answers(table: np.ndarray, batch: PairBatch) -> ChosenRejected:
    found = torch.from_numpy(table[list(batch.pair_ids)])
    return ChosenRejected(found[:, 0], found[:, 1])


Ask = Callable[..., TokenLoss]
"""A `PackedCausalLM`'s call, of whatever holds it."""


@contextmanager
def starting_policy(engine: Engine) -> Iterator[tuple[Ask, bool]]:
    """The engine asked before it trains, adapters off; it shares prefixes if training does."""
    engine.eval()
    with adapters_off(engine.module):
        yield engine, True
    engine.train()


@contextmanager
def other_model(
    job: JobConfig, artifact: Artifact, tokenizer: PreTrainedTokenizerFast, world: World
) -> Iterator[tuple[Ask, bool]]:
    """Another policy, on the device while it is asked; and whether it can share prefixes."""
    model = load_frozen_policy(job, artifact, tokenizer, world)
    module = cast(PackedCausalLM, model.module)
    yield model, module.shortcuts.shared_prefix


def reference_key(
    reference: Artifact,
    model: ModelConfig,
    plan: BatchPlan,
    *,
    data: Mapping[str, str | None],
    weights: Mapping[str, float],
    steps: int,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides the numbers, part by part, as JSON values.

    reference: just verified, so that the hashes in its manifest are those of the files, whatever lay at its
    path before. model: how it was loaded; its adapters decide nothing, for they are off. data: fingerprints
    of the data sets. weights: of the sources.
    """
    layout = {name: value for name, value in asdict(plan).items() if name not in ("rank", "sequence_rank")}
    return {
        "weights": _hashes(reference, _is_weights),
        "architecture": _hashes(reference, _is_architecture),
        "data": dict(data),
        "batches": {**layout, "steps": steps, "source_weights": dict(weights)},
        "model": {
            "dtype": model.dtype.value,
            "quantize": model.quantize.value,
            # with any of them other tokens are computed at once: other last bits
            "gradient_checkpointing": model.gradient_checkpointing,
            "tiled_mlp": model.tiles_feed_forward,
            "compile": bool(model.compile),
            # whether the policy's own code runs, or that of transformers under the same name
            "trust_remote_code": model.trust_remote_code,
        },
        "machine": _machine(device, model.quantize),
        "code": _code_version(),
    }


def _hashes(reference: Artifact, wanted: Callable[[str], bool]) -> dict[str, str]:
    return {name: file["sha256"] for name, file in sorted(reference.manifest.files.items()) if wanted(name)}


def _is_weights(name: str) -> bool:
    """The adapters in a folder beside them are merged into them already."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def _is_architecture(name: str) -> bool:
    """The config and code of the policy's own, which may lie in packages."""
    return name == "config.json" or name.endswith(".py")


def _machine(device: torch.device, quantize: Quantize) -> dict[str, Any]:
    """Other kernels give other last bits."""
    packages = ["transformers"] if quantize is Quantize.none else ["transformers", "bitsandbytes"]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
    }


def _code_version() -> str:
    """Hash of `HASHED` and of this module: a change is a miss.

    A miss costs one pass over the pairs, and a number that is no longer right is not seen by anyone.
    """
    total = hashlib.sha256()
    for module in HASHED:
        total.update(Path(str(module.__file__)).read_bytes())
    total.update(Path(__file__).read_bytes())
    return total.hexdigest()


def load_or_compute(
    opened: AbstractContextManager[tuple[Ask, bool]],
    batches: PairBatches,
    held_out: PairDataset | None,
    steps: int,
    key: Mapping[str, Any],
    folder: Path,
    world: World,
    say: Say,
) -> Reference:
    """The reference's numbers from the cache in `folder`, or computed and put there; all ranks call it.

    opened: `starting_policy` or `other_model`, entered where there is something to compute. key: see
    `reference_key`.
    """

    def look() -> Reference | None:
        found, why = _read(folder, key)
        if found is None:
            say(f"computing the reference log-probabilities ({why})")
        else:
            say("reference log-probabilities: from the cache")
        return found

    found = broadcast_from_rank0(world, look)
    if found is None:
        computed = _compute(opened, batches, held_out, steps, world, say)
        record = broadcast_from_rank0(world, lambda: _write(folder, key, computed))
        found = replace(computed, record=record)
    return found


# --- Computing --------------------------------------------------------------------------------------


class _Scored(NamedTuple):
    """What a rank found in one batch."""

    step: int  # of training, from 0; of held-out batches, which have each pair once, their number
    pair_ids: tuple[int, ...]
    logps: np.ndarray  # float64 [P, 2]


@torch.no_grad()
def _compute(
    opened: AbstractContextManager[tuple[Ask, bool]],
    batches: PairBatches,
    held_out: PairDataset | None,
    steps: int,
    world: World,
    say: Say,
) -> Reference:
    """Each rank computes its share of the batches; all return all numbers."""
    with opened as (ask, shares_prefixes):
        if batches.plan.share_prefix and not shares_prefixes:
            say("note: the reference reads a prompt anew with each answer: its network cannot share prefixes")
            batches = batches.one_by_one()
        train = _sums(ask, _training_batches(batches, steps, say), world.device)
        evaluation = () if held_out is None else evaluation_pair_batches(held_out, batches.plan)
        return Reference(
            _table(train, len(batches.dataset)),
            _table(_sums(ask, enumerate(evaluation), world.device), 0 if held_out is None else len(held_out)),
        )


def _training_batches(batches: PairBatches, steps: int, say: Say) -> Iterator[tuple[int, PairBatch]]:
    """(step, batch) of this rank, without the steps of which all pairs were seen before.

    As many on every rank: the ranks of a partitioned model compute together.
    """
    seen = np.zeros(len(batches.dataset), bool)
    last_line = time.monotonic()
    for step in range(steps):
        pairs = np.concatenate(batches.rows(step))
        if seen[pairs].all():
            if seen.all():
                return
            continue
        seen[pairs] = True
        yield from ((step, batch) for batch in batches.micro_batches(step))
        if time.monotonic() - last_line > PROGRESS_SECONDS:
            say(f"reference log-probabilities of {int(seen.sum()):,} of {len(seen):,} pairs")
            last_line = time.monotonic()


def _sums(ask: Ask, batches: Iterable[tuple[int, PairBatch]], device: torch.device) -> list[_Scored]:
    """What the model says of each of this rank's batches."""
    scored = []
    for step, batch in batches:
        moved = batch.to(device)
        tokens = ask(**batch_arguments(moved.documents))
        losses = reads_of_group(tokens.token_losses, moved.target_reads)
        nll = answer_sums(losses, moved.document_of_target, len(batch.pair_ids))
        scored.append(_Scored(step, batch.pair_ids, -torch.stack(nll, 1).cpu().numpy()))
    return scored


def _table(own: list[_Scored], pairs: int) -> np.ndarray:
    """All ranks' numbers, float64 [pairs, 2]: of each pair those of the first step that has it.

    Within a step the first rank's come first. What a later step found only because it also has a pair that
    was unknown is left out: training has met those pairs before, in other company.
    """
    steps = np.repeat([scored.step for scored in own], [len(scored.pair_ids) for scored in own])
    ids = [pair for scored in own for pair in scored.pair_ids]
    logps = np.concatenate([np.empty((0, 2)), *(scored.logps for scored in own)])
    shares = all_gather_arrays([steps.astype(np.int64), np.array(ids, np.int64), logps])
    all_steps, all_ids, all_logps = (np.concatenate(parts) for parts in zip(*shares, strict=True))
    order = np.argsort(all_steps, kind="stable")
    seen, first = np.unique(all_ids[order], return_index=True)
    table = np.full((pairs, 2), np.nan)
    table[seen] = all_logps[order][first]
    return table


# --- The cache --------------------------------------------------------------------------------------


def _path(folder: Path, key: Mapping[str, Any]) -> Path:
    return folder / f"{content_sha256(key)[:24]}.npz"


def _read(folder: Path, key: Mapping[str, Any]) -> tuple[Reference | None, str]:
    """What is cached under the key; or None, and why there is nothing."""
    path = _path(folder, key)
    if path.exists():
        try:
            return _unpacked(path), ""
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
            return None, "the cached ones are damaged"
    return None, _why_missed(folder, key)


def _unpacked(path: Path) -> Reference:
    content = path.read_bytes()
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        reference = Reference(stored["train"], stored["held_out"], _record_of(path, content))
        checksum, key = str(stored["checksum"]), json.loads(str(stored["key"]))
    if checksum != _checksum(reference):
        raise ValueError("the checksum does not match")
    if _path(path.parent, key) != path:
        raise ValueError("it was written under another key")
    return reference


def _record_of(path: Path, content: bytes) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}


def _write(folder: Path, key: Mapping[str, Any], reference: Reference) -> dict[str, str]:
    """Put the numbers under their key by a rename: readers find the whole file or none. Its record."""
    path = _path(folder, key)
    content = io.BytesIO()
    np.savez(
        content,
        allow_pickle=False,
        train=reference.train,
        held_out=reference.held_out,
        key=np.array(json.dumps(key)),
        checksum=np.array(_checksum(reference)),
    )
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [content.getbuffer()])
    return _record_of(path, content.getvalue())


def _checksum(reference: Reference) -> str:
    total = hashlib.sha256()
    for table in (reference.train, reference.held_out):
        total.update(str(table.shape).encode() + np.ascontiguousarray(table).tobytes())
    return total.hexdigest()


def _why_missed(folder: Path, key: Mapping[str, Any]) -> str:
    """Which parts of the key differ from those of the newest numbers in the cache."""
    newest_first = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in newest_first:
        with contextlib.suppress(ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
            with np.load(path, allow_pickle=False) as stored:
                before = json.loads(str(stored["key"]))
            return f"changed since the last time: {', '.join(_changes(before, key))}"
    return "none are cached yet"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Names of the parts that differ; settings with what they were and are."""
    for name, value in now.items():
        if name in ("batches", "model", "machine"):
            old = before.get(name, {})
            yield from (f"{k} {old.get(k)} -> {v}" for k, v in value.items() if old.get(k) != v)
        elif before.get(name) != value:
            yield name
