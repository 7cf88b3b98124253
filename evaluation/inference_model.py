"""A model that is asked: its artifact, tokenizer and weights, on one device.

Takes the folder of an artifact; gives what reads rows and what answers. Weights are loaded when they are
asked for, and whoever asked lets them go, so that two models need the memory of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from common.artifacts import Artifact, read_manifest
from common.config import DataConfig, Dtype, ModelConfig, dtype_on
from common.data.dataset_types import DatasetType, Opened
from common.data.stored import StoredRecords
from common.decoding.generate import read_rows
from common.handoff import TOKEN_FIELDS, load_named
from common.model.architecture import CAUSAL_LM
from common.model.loading import load_model
from common.model.packed import PackedCausalLM
from common.model.probes import find_shortcuts
from common.model.scalar_head import REWARD_MODEL, PackedScalarModel
from common.model.tokenizer import load_tokenizer
from common.stage import Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Say = Callable[[str], None]


@dataclass(frozen=True)
class InferenceModel:
    """named: what the user typed. key: for messages. device: where it runs."""

    artifact: Artifact
    named: str
    key: str
    dtype: Dtype
    device: torch.device

    @property
    def role(self) -> Role:
        role = self.artifact.manifest.role
        assert role is not None
        return role

    @property
    def config(self) -> ModelConfig:
        dtype = dtype_on(self.dtype, gpu=self.device.type == "cuda")
        return ModelConfig(path=str(self.artifact.path), dtype=dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.config)

    def network(self) -> PreTrainedModel:
        """The weights, on the device, in evaluation mode."""
        head = CAUSAL_LM if self.role is Role.policy else REWARD_MODEL
        return load_model(self.config, self.tokenizer, head, seed=0, device=self.device).eval()

    def packed(self) -> Any:
        """The same behind the calls that a step makes of its engine: PackedCausalLM, PackedScalarModel."""
        network = self.network()
        kind = PackedCausalLM if self.role is Role.policy else PackedScalarModel
        return kind(network, find_shortcuts(network)).eval()

    def rows(self, data: DataConfig, kind: DatasetType[Opened], *, whole_context: bool, say: Say) -> Opened:
        """All rows of `data`, as this model reads them; says what became of them."""
        return read_rows(data, self.artifact, self.tokenizer, kind, whole_context=whole_context, say=say)

    def reads_as(self, other: InferenceModel) -> bool:
        """Whether both make the same tokens of a text."""
        ours, theirs = self.artifact.manifest.details, other.artifact.manifest.details
        return all(name in ours and ours[name] == theirs.get(name) for name in TOKEN_FIELDS)


def load_inference_model(
    path: str, named: str, key: str, dtype: Dtype, device: torch.device, role: Role | None = None
) -> InferenceModel:
    """The verified artifact at `path`. role: that it must have; by default whatever it has.

    UserError naming `key` where there is none.
    """
    role = role or read_manifest(path).role or Role.policy
    return InferenceModel(load_named(path, role, key), named, key, dtype, device)


def places_of(rows: StoredRecords) -> dict[str, int]:
    """Indices by a key that the record has in every model's rows: its place, and which of its row's it is."""
    seen: Counter[str] = Counter()
    found = {}
    for index in range(len(rows)):
        place = rows.place(index)
        seen[place] += 1
        found[place if seen[place] == 1 else f"{place}#{seen[place]}"] = index
    return found
