"""`python -m common.training.rounding ARTIFACT --dtype DTYPE --out FOLDER`: an artifact in another dtype.

Takes an artifact, or adapters alone. Writes a second one in which each weight is rounded once and the configs
name the new dtype; all other files are the same. Its manifest and a line say what was lost. Weights that the
dtype cannot hold are a UserError. Adapters beside merged weights stay as they are. A process of its own,
since the controller imports no torch.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.artifacts import CARD, MANIFEST, hash_files, read_json, verify, write_json, write_manifest
from common.card import model_card
from common.config import Dtype
from common.errors import UserError
from common.runtime.entry import command_main
from common.training.export import disk_errors_of_weights

DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}


@dataclass(frozen=True)
class RoundingStats:
    """How rounding changed weights. zeroed: weights that became 0."""

    weights: int = 0
    changed: int = 0
    zeroed: int = 0
    squares: float = 0.0  # sum over all weights
    errors: float = 0.0  # the same of what they changed by

    def __add__(self, other: RoundingStats) -> RoundingStats:
        return RoundingStats(
            *(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True))
        )

    @property
    def relative(self) -> float:
        """Root mean square of the changes, as a share of that of the weights."""
        return math.sqrt(self.errors / self.squares) if self.squares else 0.0

    def in_words(self, before: str, after: str) -> str:
        """A line for the user."""
        if not self.changed:
            return f"{before} to {after}: no weight changed"
        share, zeroed = self.changed / self.weights, f", and {self.zeroed:,} became 0" if self.zeroed else ""
        changed = f"{share:.1%} of the weights changed, by {self.relative:.2g} of their size"
        return f"{before} to {after}: {changed}{zeroed}"


def round_artifact(artifact: Path, dtype: Dtype, out: Path) -> str:
    """Write `artifact` in another dtype to the new folder `out`; returns what was lost, in words.

    UserError where a weight cannot be held, or the disk refuses.
    """
    with disk_errors_of_weights(out):
        return _rounded(artifact, dtype, out)


def _rounded(artifact: Path, dtype: Dtype, out: Path) -> str:
    manifest = verify(artifact)
    before, wanted = str(manifest.details.get("dtype")), DTYPES[dtype]
    after = str(wanted).removeprefix("torch.")
    out.mkdir()
    lost = RoundingStats()
    for path in sorted(artifact.iterdir()):
        if path.suffix == ".safetensors":
            lost += round_file(path, wanted, out / path.name)
        elif path.name == "config.json":
            write_json(out / path.name, _renamed(read_json(path), after))
        elif path.is_dir():
            shutil.copytree(path, out / path.name)
        elif path.name not in (MANIFEST, CARD):
            shutil.copy(path, out / path.name)
    _correct_index(out)
    rounded = {"from": before, "changed": lost.changed, "zeroed": lost.zeroed, "relative": lost.relative}
    details = {**manifest.details, "dtype": after, "rounded": rounded}
    assert manifest.role is not None
    (out / CARD).write_text(model_card(manifest.role, details), encoding="utf-8")
    write_manifest(out, replace(manifest, files=hash_files(out), details=details))
    return lost.in_words(before, after)


def round_file(source: Path, dtype: torch.dtype, target: Path) -> RoundingStats:
    """Round the floating-point tensors of a safetensors file; UserError where one cannot be held."""
    from safetensors.torch import load_file, save_file

    tensors, lost = load_file(source), RoundingStats()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = rounded = tensor.to(dtype)
            if not bool(rounded.isfinite().all()) and bool(tensor.isfinite().all()):
                raise UserError(
                    f"{name} has weights up to {float(tensor.abs().max()):.3g}, which {dtype} cannot hold",
                    hint="--dtype bf16 has the range of fp32",
                )
            lost += rounding_stats(tensor, rounded)
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(source.stat().st_mode)
    return lost


def rounding_stats(before: torch.Tensor, after: torch.Tensor) -> RoundingStats:
    """How the weights of a tensor changed."""
    values, change = before.double(), before.double() - after.double()
    zeroed = (values != 0) & (after == 0)
    sums = (float((side * side).sum()) for side in (values, change))
    return RoundingStats(values.numel(), int((change != 0).sum()), int(zeroed.sum()), *sums)


def _renamed(config: Any, dtype: str) -> Any:
    """A config in which every `dtype` is another one, also of its parts."""
    if not isinstance(config, dict):
        return config
    return {key: dtype if key == "dtype" else _renamed(value, dtype) for key, value in config.items()}


def _correct_index(folder: Path) -> None:
    """The total size in the index of weights in several files."""
    for path in folder.glob("*.safetensors.index.json"):
        index = read_json(path)
        sizes = {name: _bytes_in(folder / name) for name in set(index["weight_map"].values())}
        write_json(path, {**index, "metadata": {**index["metadata"], "total_size": sum(sizes.values())}})


def _bytes_in(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        return sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118


def main() -> int:
    """0, or 2 with one line where the artifact cannot be had in this dtype."""
    parser = argparse.ArgumentParser(prog="python -m common.training.rounding")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--dtype", type=Dtype, choices=list(DTYPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    def work() -> int:
        print(f"note: {round_artifact(given.artifact, given.dtype, given.out)}", flush=True)
        return 0

    return command_main(work)


if __name__ == "__main__":
    sys.exit(main())
