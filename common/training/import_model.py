"""`python -m common.training.import_model MODEL --out FOLDER --role ROLE`: a published model as an artifact.

Takes a folder or a hub model that transformers reads: any causal LM as a policy, any sequence classifier with
one label as a reward model; or the folder of a LoRA adapter of a policy, which is merged into its base. Loads
it in the dtype that its weights have, settles tokenizer and terminators as a step would, and exports it with
the same checks; no weight changes. Trains nothing. A process of its own, since the controller imports no
torch.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.artifacts import file_sha256
from common.config import Dtype, ModelConfig, TokenizerConfig
from common.data.chat import check_template
from common.errors import UserError
from common.files import commit_folder, disk_errors, unfinished
from common.handoff import PAD
from common.model.adapter_folder import Adapter, adapters_base, read_adapter
from common.model.architecture import CAUSAL_LM, HeadSpec, read_config
from common.model.hub import fetch, loading_errors
from common.model.loading import load_model
from common.model.packed import PackedCausalLM, PackedModel
from common.model.probes import Shortcuts
from common.model.scalar_head import REWARD_MODEL, PackedScalarModel
from common.model.tokenizer import load_tokenizer, terminators_of
from common.notices import listen
from common.redact import shown
from common.runtime.entry import command_main
from common.stage import Role
from common.training.export import ExportMismatch, ask_live, export_model
from common.training.training_record import origin_of_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DTYPES = {"F32": Dtype.fp32, "BF16": Dtype.bf16, "F16": Dtype.fp16}
HEADS = {Role.policy: "ForCausalLM", Role.reward_model: "ForSequenceClassification"}
"""How transformers' class of a role's models ends; a config names it under `architectures`."""
PACKED: dict[Role, tuple[HeadSpec, type[PackedModel]]] = {
    Role.policy: (CAUSAL_LM, PackedCausalLM), Role.reward_model: (REWARD_MODEL, PackedScalarModel),
}  # fmt: skip
SAMPLE = "The capital of France is Paris, and the capital of Italy is Rome."
"""The token ids on which the exported model is compared with the loaded one."""


def import_model(model: ModelConfig, role: Role, out: Path) -> Path:
    """Write the model that `model` names to `out`, an artifact for `role`; returns `out`.

    model: of its settings, path, revision, chat template and trust in remote code count; the dtype is taken
    from the weights. UserError for a model that the pipeline can neither train nor score with.
    """
    named = str(model.path)
    adapter = read_adapter(Path(named).expanduser(), role)
    base, revision = (named, model.revision) if adapter is None else (adapter.base, adapter.revision)
    with adapters_base(adapter):
        folder, commit = fetch(base, revision, "model")
    weights = sorted(folder.glob("*.safetensors"))
    model = ModelConfig(
        path=str(folder), dtype=stored_dtype(weights), chat_template=model.chat_template,
        trust_remote_code=model.trust_remote_code,
        tokenizer=TokenizerConfig(path=None if adapter is None else adapter.tokenizer),
    )  # fmt: skip
    check_head(model, role)
    tokenizer = load_tokenizer(model)
    if not tokenizer.chat_template:
        raise UserError(
            "it has no chat template", hint="python -m pipeline import ... --chat-template chatml"
        )
    if role is Role.policy:
        check_template(tokenizer)
    details: dict[str, Any] = {
        "parents": [],
        "base_model": base,
        "base_revision": commit,
        "origin": origin_of_model(base, commit),
        "imported": {
            "from": named,
            "weights": {
                path.name: file_sha256(path) for path in [*weights, *(adapter.files if adapter else ())]
            },
            PAD: read_config(model).pad_token_id,
        },
    }
    with disk_errors(out), unfinished(f".{out.name}.", out.parent, say) as beside:
        try:
            made = _export(model, adapter, role, tokenizer, beside / "export", details)
        except ExportMismatch as error:
            fault = error.message.partition("; ")[0]
            raise UserError(f"what is read back of it differs: {fault}", hint="use another model") from error
        commit_folder(made, out)
    return out


def say(line: str) -> None:
    """Print a line at once, in order with what the controller prints."""
    print(shown(line), flush=True)


def _export(
    model: ModelConfig,
    adapter: Adapter | None,
    role: Role,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    details: dict[str, Any],
) -> Path:
    ids = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    document = torch.tensor([*ids, terminators_of(tokenizer)[0]])
    head, packed = PACKED[role]
    network: Any = load_model(model, tokenizer, head, seed=0, device=torch.device("cpu"))
    network = (network if adapter is None else adapter.around(network)).eval()
    probe = ask_live(packed(network, Shortcuts()), [document])
    return export_model(network, None, tokenizer, folder, probe, details=details, say=say)


def stored_dtype(weights: list[Path]) -> Dtype:
    """The dtype of the tensors in safetensors files; where they are mixed fp32, which holds all others."""
    from safetensors import safe_open

    found: set[str] = set()
    for path in weights:
        with loading_errors(str(path), "model"), safe_open(path, framework="pt") as tensors:
            names = tensors.keys()
            found |= {tensors.get_slice(name).get_dtype() for name in names}
    if unknown := sorted(found - DTYPES.keys()):
        raise UserError(
            f"its weights are {', '.join(unknown)}: quantised weights are not trained",
            hint="name the model that was quantised, in bf16, fp16 or fp32",
        )
    return DTYPES[found.pop()] if len(found) == 1 else Dtype.fp32


def check_head(model: ModelConfig, role: Role) -> None:
    """UserError for a model without the role's head: transformers would make one up, or drop the other."""
    wanted = HEADS[role]
    named = read_config(model).architectures or []
    if named and not any(name.endswith(wanted) for name in named):
        what = "a causal LM" if role is Role.policy else "a sequence classifier with one label"
        raise UserError(f"it is a {', '.join(named)}, where {what} is needed", hint=f"name a ...{wanted}")


def as_typed(message: str, model: str) -> str:
    """The message with `it` for `model.path=MODEL`, which nobody typed: a step names its base model so."""
    return re.sub(rf"\bmodel(\.path)?=({re.escape(model)}(?![\w/-])|\S+)", "it", message)


def main() -> int:
    """0, or 2 with one line where the model cannot be taken."""
    parser = argparse.ArgumentParser(prog="python -m common.training.import_model")
    parser.add_argument("model", help="a folder or a hub name")
    parser.add_argument("--out", type=Path, required=True, help="the artifact's folder")
    parser.add_argument("--role", type=Role, choices=list(Role), required=True)
    parser.add_argument("--named", required=True, help="what the user typed, for messages")
    parser.add_argument("--revision")
    parser.add_argument("--chat-template")
    parser.add_argument("--trust-remote-code", action="store_true")
    given = parser.parse_args()
    listen(lambda line: print(f"notice: {shown(line)}", flush=True))
    model = ModelConfig(
        path=given.model, revision=given.revision, chat_template=given.chat_template,
        trust_remote_code=given.trust_remote_code,
    )  # fmt: skip

    def work() -> int:
        try:
            import_model(model, given.role, given.out)
        except UserError as error:
            said = as_typed(error.message, given.model)
            raise UserError(f"{given.named} cannot be imported: {said}", hint=error.hint) from error
        return 0

    return command_main(work)


if __name__ == "__main__":
    sys.exit(main())
