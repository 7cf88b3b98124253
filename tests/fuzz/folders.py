"""Artifacts, checkpoints, runs and models: files damaged, manifests rewritten, names and links changed.

What differs from what was written is found, by `verify`, where a step takes an artifact, and on resume.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from common.artifacts import (
    KINDS,
    MANIFEST,
    Manifest,
    content_sha256,
    hash_files,
    write_manifest,
)
from common.config import Dtype, ModelConfig
from common.errors import UserError
from common.handoff import TOKEN_FIELDS, check_same_tokens, load_named
from common.runtime.distributed import World
from common.stage import Role
from common.training.checkpoint import Checkpoints
from common.training.snapshot import Open
from pipeline import checks
from pipeline.planning.network import network_of
from tests.fuzz import odd
from tests.fuzz.driver import Silent, command, refused_or
from tests.pipeline.test_verify import make_caches, make_step

DETAILS = {**dict.fromkeys(TOKEN_FIELDS, "0" * 64), "data": {"train": "a"}, "metrics": {"loss": 0.5}}
MOVES = (
    "remove", "rename", "add", "empty folder", "link to itself", "link elsewhere", "linked folder", "pipe",
)  # fmt: skip
LOADED = "stray.safetensors"
READ = (".json", ".jsonl", ".yaml")
"""Files that are read before they are hashed: a pipe in their place would be waited for."""
LAST = (MANIFEST, "key.json", "lineage.json", "resolved.yaml")
"""Files without which a folder is not finished, or not there: nothing records them in turn."""


class Change(NamedTuple):
    """What is done to a folder."""

    file: str
    """by its place in it"""
    act: str
    """`damage`, `manifest`, or one of MOVES"""
    seed: int

    @classmethod
    def drawn(cls, draw: random.Random, files: list[str], *, forges: bool = True) -> Change:
        """One of any kind."""
        act = draw.choice(("damage", "damage", "damage", "manifest" if forges else "damage", "move"))
        return cls(draw.choice(files), draw.choice(MOVES) if act == "move" else act, draw.randrange(2**32))

    def make(self, folder: Path) -> bool:
        """Whether the folder is then another one, which must be refused."""
        draw, path = random.Random(self.seed), folder / self.file
        if self.act == "damage":
            return self._damage(draw, path)
        if self.act == "manifest":
            _forge(draw, folder)
            return False
        name = "".join(sign for sign in draw.choice(odd.TEXTS)[:99] if sign not in "/\0\ud800")
        beside = path.with_name(f"x{name}.json")
        above = [parent for parent in path.parents if parent.is_relative_to(folder)]
        is_proved = any((parent / MANIFEST).exists() for parent in above)
        if self.act == "add":
            beside.write_text("{}")
            return is_proved
        if self.act == "linked folder":
            (folder.parent / "elsewhere").mkdir()
            (folder.parent / "elsewhere" / LOADED).write_text("a")
            path.with_name("linked").symlink_to(folder.parent / "elsewhere")
            return is_proved
        if self.act == "link elsewhere":
            shutil.move(path, folder.parent / "moved")
            path.symlink_to(folder.parent / "moved")
            return False
        path.rename(beside) if self.act == "rename" else path.unlink()
        if self.act == "empty folder":
            path.mkdir()
        elif self.act == "link to itself":
            path.symlink_to(path.name)
        elif self.act == "pipe" and path.suffix not in READ:
            os.mkfifo(path)
        return path.name not in LAST

    @staticmethod
    def _damage(draw: random.Random, path: Path) -> bool:
        before = path.read_bytes()
        after = odd.damaged(draw, before)
        path.write_bytes(after)
        if path.suffix != ".json" or path.name not in (MANIFEST, "state.json", "lineage.json", "key.json"):
            return after != before
        try:
            return content_sha256(json.loads(after)) != content_sha256(json.loads(before))
        except (ValueError, TypeError, RecursionError):
            return True


def _forge(draw: random.Random, folder: Path) -> None:
    """Rewrite the manifest, with a checksum that fits."""
    body = json.loads((folder / MANIFEST).read_text())
    body.pop("checksum")
    body = odd.changed(draw, body)
    try:
        text = json.dumps({**body, "checksum": content_sha256(body)} if isinstance(body, dict) else body)
    except (TypeError, ValueError):
        text = "[" * 100_000
    (folder / MANIFEST).write_text(text)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class Copied:
    """Cases on copies of a folder that is made once."""

    name, share, forges = "", 0, True

    def __init__(self, whole: Path) -> None:
        whole.parent.mkdir(parents=True)
        self.whole = whole
        self.make(whole)
        self.files = [name for name in _files(self.whole) if self.is_verified(name)]

    def make(self, folder: Path) -> None:
        """Write what is copied."""
        raise NotImplementedError

    def is_verified(self, name: str) -> bool:
        """Whether a change of this file must be found."""
        return True

    def draw(self, draw: random.Random) -> Change:
        """What is done to the copy."""
        return Change.drawn(draw, self.files, forges=self.forges)

    def outcome(self, case: Change, folder: Path) -> str:
        """What differs is found."""
        copy = Path(shutil.copytree(self.whole, folder / "copy"))
        before = (copy / case.file).read_bytes()
        differs = case.make(copy)
        is_same = case.act == "damage" and (copy / case.file).read_bytes() == before
        outcome = self.read(case, copy)
        if differs and outcome == "accepted":
            raise Silent(f"a folder that differs from what was written is taken: {_files(copy)}")
        if outcome == "refused" and is_same:
            raise Silent("a folder that is as it was written is refused")
        return outcome

    def read(self, case: Change, folder: Path) -> str:
        """`accepted` or `refused`."""
        raise NotImplementedError


def _artifact(folder: Path, role: Role) -> None:
    (folder / "adapter").mkdir(parents=True)
    save_file({"a": torch.arange(8.0), "b": torch.ones(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    (folder / "adapter" / "tokenizer.json").write_text('{"vocabulary": ["a", "b"]}')
    write_manifest(folder, Manifest("artifact", role, hash_files(folder), DETAILS))


class Artifacts(Copied):
    """An artifact, as `verify` reads it and as a step takes it from a run before it."""

    name, share = "artifact", 90

    def make(self, folder: Path) -> None:
        _artifact(folder, Role.policy)
        _artifact(folder.parent / "reward_model", Role.reward_model)

    def read(self, case: Change, folder: Path) -> str:
        found = {refused_or("accepted", *command("verify", str(folder)))}
        found.add(_ended(lambda: self._take(folder)))
        if found == {"accepted", "refused"} and case.act != "manifest":
            raise Silent("verify and a step that takes the artifact disagree")
        return max(found)

    def _take(self, folder: Path) -> None:
        artifact = load_named(str(folder), Role.policy, "ppo.policy")
        if artifact.manifest.kind not in KINDS or not isinstance(artifact.manifest.role, Role):
            raise Silent(f"a manifest of no known kind is taken: {artifact.manifest}")
        if not isinstance(artifact.template_variables, dict):
            raise Silent("variables of the template that are none")
        reward_model = str(self.whole.parent / "reward_model")
        check_same_tokens(artifact, load_named(reward_model, Role.reward_model, "ppo.reward_model"))


class Numbers:
    """A state of a few numbers."""

    value = -1.0

    def save(self, folder: Path, open_file: Open) -> None:
        (folder / "zero").mkdir()
        with open_file(folder / "zero" / "state.pt") as file:
            torch.save({"step": torch.tensor(self.value)}, file)

    def load(self, folder: Path) -> None:
        self.value = float(torch.load(folder / "zero" / "state.pt", weights_only=True)["step"])


class Saved(Copied):
    """Two checkpoints, the newer one changed: it is resumed from the older one, or from what is as it was."""

    name, share, forges = "checkpoint", 50, False

    def make(self, folder: Path) -> None:
        for step in (10, 20):
            state = Numbers()
            state.value = float(step)
            _checkpoints(folder).save(step, state, {"step": step}, best_step=None)

    def is_verified(self, name: str) -> bool:
        return name.startswith("step_00000020/")

    def read(self, case: Change, folder: Path) -> str:
        verified = refused_or("accepted", *command("verify", str(folder)))
        state = Numbers()
        resumed = _checkpoints(folder).resume(state)
        if resumed is None or state.value != resumed.counters["step"] or state.value not in (10.0, 20.0):
            raise Silent(f"resumed with {state.value} from {resumed}")
        is_newest = state.value == 20.0
        is_judged = case.act not in ("add", "linked folder")  # what is beside the listed files is not loaded
        if is_judged and is_newest != (verified == "accepted"):
            raise Silent(f"verify says {verified}, and it is resumed from {resumed.path}")
        return verified


def _checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, keep=2, world=World(0, 1, 0, torch.device("cpu")))


class Runs(Copied):
    """A folder of runs with their caches, as `verify` and the report read it."""

    name, share, forges = "run", 15, False

    def make(self, folder: Path) -> None:
        make_step(folder, "sft", 1)
        make_step(folder, "reward", 2)
        make_caches(folder)

    def is_verified(self, name: str) -> bool:
        return not name.endswith((".npz", ".lock"))  # headers of an archive hold times

    def read(self, case: Change, folder: Path) -> str:
        if case.seed % 8 == 0:
            refused_or("accepted", *command("report", str(folder / "a")))
            (folder / "a" / "report.html").unlink(missing_ok=True)
        return refused_or("accepted", *command("verify", str(folder)))


class Models(Copied):
    """A model's folder, without a manifest: loaded, or refused."""

    name, share, forges = "model", 30, False

    def make(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from tests.tiny import CHATML, tiny_tokenizer

        tokenizer = tiny_tokenizer(CHATML)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def outcome(self, case: Change, folder: Path) -> str:
        from common.model.loading import load_model
        from common.model.tokenizer import load_tokenizer

        copy = Path(shutil.copytree(self.whole, folder / "copy"))
        case.make(copy)
        model = ModelConfig(path=str(copy), dtype=Dtype.fp32)

        def load() -> None:
            checks.context_length(model)
            network_of(model)
            load_model(model, load_tokenizer(model), seed=0, device=torch.device("cpu"), max_length=16)

        return _ended(load)


def _ended(work: Callable[[], object]) -> str:
    try:
        work()
    except UserError:
        return "refused"
    return "accepted"
