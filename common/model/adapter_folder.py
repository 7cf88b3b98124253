"""A LoRA adapter as peft saves it: read from a folder, and put around its base.

Takes the folder; refuses what is no plain adapter of a causal LM, says which base it needs. Does not merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.artifacts import read_json
from common.errors import UserError
from common.model.hub import loading_errors
from common.stage import Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MORE = ("modules_to_save", "trainable_token_indices", "layer_replication")
"""Of its config: what would change more than the matrices that are merged."""


@dataclass(frozen=True)
class Adapter:
    """base, revision: the model it was trained on, as its config names it."""

    folder: Path
    base: str
    revision: str | None

    @property
    def files(self) -> list[Path]:
        """Its weights."""
        return [self.folder / WEIGHTS]

    @property
    def tokenizer(self) -> str | None:
        """The folder, where a tokenizer lies beside the adapter."""
        return str(self.folder) if (self.folder / "tokenizer.json").exists() else None

    def around(self, network: PreTrainedModel) -> Any:
        """A PeftModel of the network with the adapter in it. UserError where it does not fit."""
        import peft

        path = str(self.folder)
        with loading_errors(path, "adapter"):
            try:
                return peft.PeftModel.from_pretrained(network, path)
            except (RuntimeError, ValueError) as error:  # other shapes, other names
                first = str(error).strip().splitlines()[0]
                raise UserError(
                    f"the adapter {path} does not fit {self.base}: {first}",
                    hint="name the base it was trained on",
                ) from error


def read_adapter(folder: Path, role: Role) -> Adapter | None:
    """The adapter in a folder; None where it holds a whole model. UserError for one that cannot be merged."""
    if (folder / "config.json").exists() or not (folder / CONFIG).exists():
        return None
    try:
        config = read_json(folder / CONFIG)
        base, kind = config["base_model_name_or_path"], config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error!r}", hint="get the adapter again") from error
    fault = _fault(folder, config, kind, role)
    if fault:
        raise UserError(
            f"it is an adapter that {fault}", hint="merge it where it was trained, and name the merged model"
        )
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / CONFIG} does not name its base", hint="set base_model_name_or_path in it")
    revision = config.get("revision")
    return Adapter(folder, base, revision if isinstance(revision, str) and revision else None)


def _fault(folder: Path, config: Mapping[str, Any], kind: object, role: Role) -> str | None:
    if role is not Role.policy:
        return f"is to be a {role.value}, where only adapters of policies are merged"
    if kind != "LORA":
        return f"is of the kind {kind}, where LORA is merged"
    if more := [name for name in MORE if config.get(name)]:
        return f"changes more than matrices ({', '.join(more)})"
    if config.get("bias", "none") != "none":
        return f"changes biases (bias: {config['bias']})"
    return None if (folder / WEIGHTS).is_file() else f"has no {WEIGHTS}"


@contextmanager
def adapters_base(adapter: Adapter | None) -> Iterator[None]:
    """Say of a base that is not there whose it is."""
    try:
        yield
    except UserError as error:
        if adapter is None:
            raise
        raise UserError(
            f"it is an adapter, and its base {adapter.base} cannot be had: {error.message}",
            hint=f"get the base, or write where it is into {adapter.folder / CONFIG}",
        ) from error
