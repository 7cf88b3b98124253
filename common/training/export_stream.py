"""An artifact's weights from a partitioned model to its files, tensor by tensor: no process holds them all.

Takes an engine on ZeRO-3 and the model that it trains; rank 0 writes files of safetensors, each tensor when
it is gathered, and hashes what it writes. Adapters are merged on the way; what they were merged into is
written beside, until the artifact has been checked. `Streamed` gives the tensors back, mapped from the files,
and compares the files with what was written. Writes neither config nor tokenizer, and judges no answers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from common.artifacts import FileRecord
from common.model.adapters import (
    adapted_layers,
    base_name,
    is_adapter,
    is_of_base,
    merged_weight,
    unwrapped,
)
from common.notices import notice
from common.training.engine import Engine, return_free_memory
from common.training.export_model import plain_config, tied_names, with_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_SIZE = "5GB"
"""Of the largest file, as most models on the hub have it: the files are hashed side by side."""

BASE = "base.safetensors"
"""File of the tensors that adapters were merged into."""

KEPT = 256 << 20
"""Bytes of tensors after which what the allocator kept of them, and of their merges, goes back to the system:
between tensors of several sizes gaps stay that no other fits, and they would grow with every layer."""

WHOLE = "rank 0 gathers all weights before it exports them"


@dataclass(frozen=True)
class Merged:
    """Adapters that were merged on the way. Names are those of the model without adapters."""

    names: Mapping[str, str]  # of all tensors in the files, and of the same tensors in the module
    adapters: Mapping[str, torch.Tensor]  # by the module's names
    differences: Mapping[str, float]  # of each merge: see `adapters.merged_weights`


@dataclass(frozen=True)
class Streamed:
    """What rank 0 wrote for the artifact at `export`. error: of the disk, after which nothing was written."""

    export: Path
    sha256: Mapping[str, str]  # of each file, of the bytes that it was given
    tied: Mapping[str, str]  # names of tensors that are not written, and the names of those they are
    error: OSError | None = None
    merged: Merged | None = None

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors under the module's names, mapped from the files: they take memory of the system's that
        it can take back. Adapters stand beside what they were merged into."""
        from safetensors.torch import load_file

        state = self._written()
        if self.merged is None:
            return state
        state |= load_file(_base_of(self.export) / BASE)
        return {self.merged.names[name]: tensor for name, tensor in state.items()} | dict(
            self.merged.adapters
        )

    def merges(self) -> Iterator[tuple[str, torch.Tensor, float]] | None:
        """What `adapters.merged_weights` gives, mapped from the files; None without adapters."""
        if self.merged is None:
            return None
        state, differences = self._written(), self.merged.differences
        return ((name, state[name], differences[name]) for name in differences)

    def _written(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        state: dict[str, torch.Tensor] = {}
        for name in self.sha256:
            state |= load_file(partial_of(self.export) / name)
        return state | {name: state[source] for name, source in self.tied.items()}

    def fault(self, records: Mapping[str, FileRecord]) -> str | None:
        """The first file whose bytes are not those that were written, in words. records: as it is read."""
        for name, sha256 in self.sha256.items():
            if name not in records or records[name]["sha256"] != sha256:
                return f"{name} is not the same after reading it back"
        return None


def partial_of(folder: Path) -> Path:
    """Where the artifact at `folder` is made, before it is committed."""
    return folder.with_name(folder.name + ".tmp")


def _base_of(folder: Path) -> Path:
    """Where the tensors are kept that adapters were merged into, while the artifact is made."""
    return folder.with_name(folder.name + ".base.tmp")


def forget_base(folder: Path) -> None:
    """Remove what only the check of the artifact at `folder` needs."""
    shutil.rmtree(_base_of(folder), ignore_errors=True)


@contextmanager
def with_base(folder: Path) -> Iterator[None]:
    """While an artifact is made and checked, after which what only the check needs is removed."""
    try:
        yield
    finally:
        forget_base(folder)


def empty(partial: Path) -> None:
    """Nothing is left of an export that did not end."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def stream_weights(engine: Engine, model: PreTrainedModel, folder: Path, *, writes: bool) -> Streamed | None:
    """Write the weights to where the artifact at `folder` is made; None, said in a notice, where the model is
    exported whole.

    writes: on this rank, which is rank 0. A collective; an error of the disk is raised by nobody yet, because
    the other ranks would wait for the rest.
    """
    reason, blank = _why_whole(model)
    if reason is not None or blank is None:
        notice(WHOLE, str(reason))
        return None
    found = _tensors(model)
    names = {name: own for name, own in _names_in_files(found).items() if name in blank}
    merging = _Merging(engine, model, found) if hasattr(model, "peft_config") else None
    tied = {name: source for name, source in _tied(model, merging).items() if name in names}
    tensors = {name: found[own] for name, own in names.items() if name not in tied}
    files = _files(tensors)
    order = {name: tensors[name] for names in files.values() for name in names}
    writer = _Writer(partial_of(folder), files, tensors) if writes else None
    base = _base_writer(folder, merging, order) if writes and merging is not None else None
    for name, tensor in _giving_back(engine.whole_weights(order)):
        if writer is None:
            continue
        if base is not None and merging is not None and name in merging.layers:
            base.take(name, tensor)
            tensor = merging.merge(name, names[name], tensor)
        writer.take(name, tensor)
    if writer is None:
        return Streamed(folder, {}, tied)
    error = writer.finish()
    if base is not None:
        error = error or base.finish()
    if error is not None:
        forget_base(folder)
    merged = None if merging is None else Merged(names, merging.adapters, merging.differences)
    return Streamed(folder, writer.sha256, tied, error, merged)


def save_config(saved: PreTrainedModel, folder: Path) -> None:
    """What transformers saves beside weights; it would remove files of weights that it did not write."""
    aside = folder / "config.tmp"
    saved.save_pretrained(aside, state_dict={})
    for path in aside.iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(aside)


def _why_whole(model: PreTrainedModel) -> tuple[str | None, set[str] | None]:
    """Why a model cannot be written tensor by tensor; else the names of its tensors in a file."""
    from transformers.core_model_loading import revert_weight_conversion

    if any(hasattr(parameter, "quant_state") for parameter in model.parameters()):
        return "adapters are merged with 4-bit weights when all are at hand", None
    base = unwrapped(model)
    with torch.device("meta"):
        blank = type(base)(plain_config(base)).state_dict()
        own = set(blank) - set(base._keys_to_ignore_on_save or ())
        names = set(revert_weight_conversion(type(base)(plain_config(base)), dict(blank)))
    if names != set(blank):
        return f"model_type={base.config.model_type} has other tensors in its files than in memory", None
    return None, own


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters, which ZeRO-3 knows, and buffers that are saved, by name."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers())


def _giving_back(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same; between them, and behind the last, what the allocator kept goes back to the system."""
    kept = 0
    for name, tensor in named:
        yield name, tensor
        kept += tensor.nbytes
        if kept > KEPT:
            return_free_memory()
            kept = 0
    return_free_memory()


def _names_in_files(names: Iterable[str]) -> dict[str, str]:
    """Of tensors of the module that the artifact has, by their names without adapters."""
    return {base_name(name): name for name in names if is_of_base(name)}


def _tied(model: PreTrainedModel, merging: _Merging | None) -> dict[str, str]:
    """Tensors that are another one; with an adapter on either there are two."""
    base = unwrapped(model)
    if merging is not None and tied_names(base) & set(merging.layers):
        return {}
    return dict(base.all_tied_weights_keys)


class _Merging:
    """The adapters of a partitioned model, whole, around a base whose tensors come one after the other."""

    def __init__(self, engine: Engine, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
        """A collective, after which every rank has the adapters."""
        own = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
        self.adapters = {name: whole.detach().cpu().clone() for name, whole in engine.whole_weights(own)}
        self.differences: dict[str, float] = {}
        base = unwrapped(model)
        with torch.device("meta"):
            empty_base = type(base)(plain_config(base))
        self._adapted = with_adapters(model, empty_base, self.adapters)
        self.layers = dict(adapted_layers(self._adapted))

    def merge(self, name: str, own: str, tensor: torch.Tensor) -> torch.Tensor:
        """The next tensor with its adapter, rounded once. own: its name in the module."""
        whole = tensor.detach().cpu()
        self._adapted.load_state_dict({own: whole}, strict=False, assign=True)
        merged, self.differences[name] = merged_weight(self.layers[name])
        self._adapted.load_state_dict({own: whole.to("meta")}, strict=False, assign=True)
        return merged.to(tensor.dtype)


def _base_writer(folder: Path, merging: _Merging, order: Mapping[str, torch.Tensor]) -> _Writer:
    return _Writer(_base_of(folder), {BASE: [name for name in order if name in merging.layers]}, order)


def _shape(tensor: Any) -> torch.Size:
    """Of the whole tensor, also when ZeRO-3 has partitioned it."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def _files(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Names of the tensors of each file, in the order in which safetensors lays them."""
    from huggingface_hub import split_torch_state_dict_into_shards

    blank = {
        name: torch.empty(_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    split = split_torch_state_dict_into_shards(
        blank, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    return {
        file: sorted(names, key=lambda name: (-tensors[name].element_size(), name))
        for file, names in split.filename_to_tensors.items()
    }


class _Writer:
    """Writes files of safetensors, whose tensors come one after the other. After an error it writes none."""

    def __init__(
        self, folder: Path, files: Mapping[str, Iterable[str]], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self.error: OSError | None = None
        self._folder, self._open = folder, ExitStack()
        self._heads = {next(iter(names)): (file, _head(names, tensors)) for file, names in files.items()}
        self._hashes: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        try:
            empty(folder)
            if len(files) > 1:
                self._write_index(files, tensors)
        except OSError as error:
            self.error = error

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor; the first of a file opens it."""
        if self.error is not None:
            return
        try:
            if name in self._heads:
                file, head = self._heads[name]
                self._open.close()
                self._file = self._open.enter_context((self._folder / file).open("wb"))
                self._hash = self._hashes[file] = hashlib.sha256()
                self._write(head)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._write(flat.view(torch.uint8).numpy() if flat.numel() else b"")
        except OSError as error:
            self.error = error

    def finish(self) -> OSError | None:
        """Close the last file; the error after which nothing was written."""
        try:
            self._open.close()
        except OSError as error:
            self.error = self.error or error
        return self.error

    @property
    def sha256(self) -> dict[str, str]:
        """Of the bytes of each file."""
        return {file: found.hexdigest() for file, found in self._hashes.items()}

    def _write(self, data: Any) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)

    def _write_index(self, files: Mapping[str, Iterable[str]], tensors: Mapping[str, torch.Tensor]) -> None:
        """The file that says which tensor is where."""
        numbers = {name: _shape(tensor).numel() for name, tensor in tensors.items()}
        size = sum(count * tensors[name].element_size() for name, count in numbers.items())
        index = {
            "metadata": {"total_parameters": sum(numbers.values()), "total_size": size},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _head(names: Iterable[str], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The first bytes of a file: its length, and type, shape and place of each tensor, as JSON."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        tensor, shape = tensors[name], _shape(tensors[name])
        end = begin + shape.numel() * tensor.element_size()
        entries[name] = {"dtype": TYPES[tensor.dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""Names of types in files of safetensors."""
