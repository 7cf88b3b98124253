"""Resumable state on disk: commit, verify, fall back, keep.

A checkpoint is a folder `step_00000200/` that exists whole or not at all: every rank writes into
`step_00000200.tmp/` and hashes what it wrote, the manifest is written, all is flushed to disk, the folder
is renamed. Ranks can write beside training (`snapshot.py`); all else is a collective. What all ranks had
written when they ended, and nobody committed, is committed by the next start. On load all ranks vote
for the newest one whose files all of them could verify; a broken one is set aside under `quarantine/`, never
deleted. Retention deletes after a commit, never before.

Besides the counters it holds a `Stateful`, most often the engine; `StatefulGroup` combines several (actor,
critic, an average). The recipe decides what the counters mean. Generators have no state here: a recipe seeds
them before each step (`distributed.seed_everything`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial as partial_function
from pathlib import Path
from typing import Any, Protocol, TypeVar

from common.artifacts import (
    MANIFEST,
    Damaged,
    FileRecord,
    Manifest,
    fault_of,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from common.background import at_once, in_background
from common.errors import UserError
from common.files import commit_folder, disk_errors, set_aside, written_where
from common.phases import enter
from common.runtime.distributed import World, all_gather_or_raise, all_reduce_sum, broadcast_from_rank0
from common.training.snapshot import Buffers, Open, Snapshot

T = TypeVar("T")
log = logging.getLogger("rlhf.checkpoint")

COUNTERS = "counters.json"
QUARANTINE = "quarantine"
WRITTEN = "written.*.json"
"""What each rank wrote beside training, until it is committed."""
_NAME = re.compile(r"step_(\d{8})")


class Stateful(Protocol):
    """Anything that writes itself into a checkpoint's folder and reads itself back."""

    def save(self, folder: Path, open_file: Open) -> None:
        """Write this rank's part below `folder`, which exists, into files that `open_file` opens; all ranks
        call it.

        A disk that refuses raises OSError, once this rank has taken part in every collective.
        """

    def load(self, folder: Path) -> str | None:
        """Restore what `save` wrote, bit for bit; all ranks call it.

        The number of ranks may differ from when it was saved. Where the state was resharded, returns in words
        what changed. UserError when it cannot be resharded.
        """


class StatefulGroup:
    """Several states as one, each in a folder of its own name."""

    def __init__(self, **parts: Stateful) -> None:
        self._parts = parts

    def save(self, folder: Path, open_file: Open) -> None:
        """Save all of them, also after one that the disk refused: the other ranks may have saved that one,
        and would wait in the next one's collectives. Raises the first refusal."""
        refused: list[Exception] = []
        for name, part in self._parts.items():
            try:
                (folder / name).mkdir(exist_ok=True)  # all ranks may be making it
            except OSError as error:
                refused.append(error)  # without the folder what follows is refused as well
            try:
                part.save(folder / name, open_file)
            except (OSError, UserError) as error:
                refused.append(error)
        if refused:
            raise refused[0]

    def load(self, folder: Path) -> str | None:
        """Restore all of them; returns each change once."""
        changed = [part.load(folder / name) for name, part in self._parts.items()]
        return "; ".join(dict.fromkeys(line for line in changed if line)) or None


@dataclass(frozen=True)
class Resumed:
    """The restored checkpoint, and what happened on the way."""

    path: Path
    counters: dict[str, Any]
    set_aside: tuple[str, ...]  # newer checkpoints that could not be verified, and why
    resharded: str | None = None  # what changed, where other ranks or another ZeRO stage wrote it


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is not committed yet. records: this rank's files, once they are written."""

    partial: Path
    details: Mapping[str, Any]
    best_step: int | None
    records: Future[dict[str, FileRecord]]


class Checkpoints:
    """The checkpoints of one step of one run."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        world: World,
        base_revision: str | None = None,
        background: bool = False,
    ) -> None:
        """base_revision: commit of a hub model; one that moved under a run is refused on resume.

        background: files are held in memory and written while training goes on, which takes this rank's part
        of a checkpoint in host memory.
        """
        self.folder, self._keep, self._world = folder, keep, world
        self._details = {"world_size": world.size, "base_revision": base_revision}
        self._buffers: Buffers | None = {} if background else None
        self._pending: Pending | None = None

    def save(self, step: int, state: Stateful, counters: Mapping[str, Any], *, best_step: int | None) -> Path:
        """Commit the state after `step`; all ranks call it. The newest `keep` and the best remain.

        In the background the state is held, and `finish` commits it. UserError on a full or read-only disk,
        with what was saved before left as it was.
        """
        self.finish()
        enter("save")
        final = self.folder / f"step_{step:08d}"
        partial = final.with_name(f"{final.name}.tmp")
        if all_reduce_sum([not (final / MANIFEST).exists()]) == [0.0]:
            return final
        broadcast_from_rank0(self._world, lambda: self._start(partial))
        snapshot = Snapshot(partial, self._buffers)
        self._on_every_rank(partial, lambda: self._write_own(snapshot, state, counters))
        held = self._buffers is not None
        details = {"step": step, **self._details}
        beside = partial_function(self._write_held, snapshot, details)
        written = in_background(beside, "checkpoint") if held else at_once(snapshot.write)
        self._pending = Pending(partial, details, best_step, written)
        if not held:
            self.finish()
        return final

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part of a checkpoint that is still to be committed."""
        return self._pending is not None and self._pending.records.done()

    def finish(self) -> None:
        """Commit what is being written, once it is written on all ranks, which all call it.

        UserError as of `save`.
        """
        if (pending := self._pending) is None:
            return
        self._pending = None
        shares = self._on_every_rank(pending.partial, pending.records.result)
        broadcast_from_rank0(self._world, lambda: self._commit(pending.partial, shares, pending.details))
        broadcast_from_rank0(self._world, lambda: self._forget_old(pending.best_step))
        enter("commit.end")

    def settle(self, seconds: float) -> None:
        """Wait until this rank has written what it is writing, for so long at most; no collective. For a
        process that ends without `finish`: the next one then finds it whole."""
        if self._pending is not None:
            wait([self._pending.records], seconds)

    def resume(self, state: Stateful) -> Resumed | None:
        """Restore the newest checkpoint that every rank can verify; None when there never was one. One that
        all ranks of an earlier process had written is committed first.

        UserError when there were some and none can be verified, the newest may not be read or has another
        format, or the state cannot be resharded.
        """
        enter("load")
        broadcast_from_rank0(self._world, self._commit_written)
        broadcast_from_rank0(self._world, self._remove_unfinished)
        faulty: list[str] = []
        for step in sorted(self.steps(), reverse=True):
            path = self.folder / f"step_{step:08d}"
            faults = self._vote(path)
            if not faults:
                self._check_base(path)
                changed = state.load(path)
                counters = json.loads((path / COUNTERS).read_text())
                return Resumed(path, counters, tuple(faulty), changed)
            faulty.append(f"{path.name}: {'; '.join(faults)}")
            broadcast_from_rank0(self._world, partial_function(set_aside, path, self.folder / QUARANTINE))
        if faulty:
            raise UserError(
                f"no checkpoint under {self.folder} can be verified:\n    " + "\n    ".join(faulty),
                hint=f"they are kept under {self.folder / QUARANTINE}: restore one from a copy, "
                "or run the same command again to start from the beginning",
            )
        return None

    def load(self, step: int, state: Stateful) -> dict[str, Any]:
        """Restore the checkpoint of a step, which is kept; its counters. UserError where it is damaged."""
        path = self.folder / f"step_{step:08d}"
        if faults := self._vote(path):
            raise UserError(
                f"{path} cannot be verified: {'; '.join(faults)}", hint="restore it from a copy of the run"
            )
        state.load(path)
        return dict(json.loads((path / COUNTERS).read_text()))

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint; the same list on every rank."""

        def own() -> list[int]:
            return [int(m.group(1)) for p in self.folder.glob("step_*") if (m := _NAME.fullmatch(p.name))]

        return broadcast_from_rank0(self._world, own)

    def _start(self, partial: Path) -> None:
        self._remove_unfinished()
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)  # a run's folder that was removed is not made again
        self._check_room()
        with disk_errors(partial):
            partial.mkdir()  # not into what could not be removed

    def _remove_unfinished(self) -> None:
        """Remove the folders of a process that was killed while writing or deleting."""
        for path in self.folder.glob("step_*.tmp"):
            with _left_with_a_warning(path):
                shutil.rmtree(path)

    def _check_room(self) -> None:
        """Refuse a checkpoint that will not fit: it will be about as large as the one before."""
        before = sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        needed = sum(p.stat().st_size for p in before[-1].rglob("*") if p.is_file()) if before else 0
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise _no_room(self.folder, free, f"a checkpoint takes {needed / 2**20:.1f} MiB")

    def _write_own(self, snapshot: Snapshot, state: Stateful, counters: Mapping[str, Any]) -> None:
        state.save(snapshot.folder, snapshot.open)
        if self._buffers is None:
            enter("commit.write")  # after the collectives of the state, as what a disk refuses is raised then
        if self._world.is_rank0:
            with snapshot.open(snapshot.folder / COUNTERS) as file:
                file.write(json.dumps(dict(counters), sort_keys=True, indent=2).encode())

    def _write_held(self, snapshot: Snapshot, details: Mapping[str, Any]) -> dict[str, FileRecord]:
        """Write what is held; and, last, what that was: `_commit_written` may have to know."""
        records = snapshot.write()
        own = snapshot.folder / WRITTEN.replace("*", str(self._world.rank))
        with disk_errors(own):
            write_json(own, {"files": records, "details": dict(details)})
        return records

    def _commit_written(self) -> None:
        """Commit what all ranks of a process had written when it ended."""
        for partial in sorted(self.folder.glob("step_*.tmp")):
            try:
                shares = [read_json(path) for path in partial.glob(WRITTEN)]
                if shares and len(shares) == shares[0]["details"]["world_size"]:
                    details = shares[0]["details"]
                    self._commit(partial, [share["files"] for share in shares], details)
                    log.info("%s was written when its process ended, and is committed", partial.stem)
            except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("%s was written when its process ended, and is removed: %s", partial.stem, error)

    def _commit(
        self, partial: Path, shares: Sequence[Mapping[str, FileRecord]], details: Mapping[str, Any]
    ) -> None:
        """shares: what each rank wrote."""
        records = {name: record for share in shares for name, record in share.items()}
        for name, record in records.items():
            if not _is_there(partial / name, record["bytes"]):
                way_out = (
                    f"all ranks need one disk that works: check it, or another one with {written_where()}"
                )
                raise UserError(f"{partial / name} was written, but rank 0 does not find it", hint=way_out)
        with disk_errors(partial):
            enter("commit.manifest")
            for path in partial.glob(WRITTEN):
                path.unlink()
            write_manifest(partial, Manifest("checkpoint", None, records, dict(details)))
        enter("commit.rename")
        commit_folder(partial, partial.with_suffix(""))

    def _forget_old(self, best_step: int | None) -> None:
        enter("commit.forget")
        present = sorted(int(m.group(1)) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name)))
        for step in present[: -self._keep]:
            if step != best_step:
                path = self.folder / f"step_{step:08d}"
                unfinished = path.with_name(f"{path.name}.tmp")
                with _left_with_a_warning(path):
                    path.rename(unfinished)  # one that is half deleted must not look like a damaged one
                    shutil.rmtree(unfinished)

    def _vote(self, path: Path) -> list[str]:
        """Faults that any rank found; UserError on all ranks for other reasons, such as another format."""
        return [
            fault for faults in all_gather_or_raise(lambda: self._faults_in_share(path)) for fault in faults
        ]

    def _faults_in_share(self, path: Path) -> list[str]:
        try:
            manifest = read_manifest(path)
        except Damaged as error:
            return [error.message]
        names = sorted(manifest.files)[self._world.rank :: self._world.size]
        own = [(name, manifest.files[name]) for name in names]
        faults = [(name, fault_of(path / name, record["bytes"], record["sha256"])) for name, record in own]
        return [f"{name}: {fault}" for name, fault in faults if fault]

    def _check_base(self, path: Path) -> None:
        revision = read_manifest(path).details.get("base_revision")
        if revision != self._details["base_revision"]:
            raise UserError(
                f"{path} was trained from commit {revision} of the base model, which is now at "
                f"{self._details['base_revision']}",
                hint=f"resume with model.revision={revision}, or start a new run_name",
            )

    def _on_every_rank(self, partial: Path, action: Callable[[], T]) -> list[T]:
        """Run on all ranks; a refusal of the disk becomes a UserError, and the part is removed."""

        def attempt() -> T:
            with disk_errors(partial):
                return action()

        try:
            return all_gather_or_raise(attempt)
        except UserError:  # all ranks have learnt of it: nothing is removed under those that still write
            if self._world.is_rank0:
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _left_with_a_warning(path: Path) -> Iterator[None]:
    """A folder that cannot be removed costs room and no more: NFS refuses it while a file of it is open."""
    try:
        yield
    except OSError as error:
        log.warning("%s cannot be removed: %s; the next save tries again", path, error.strerror)


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _no_room(place: Path, free: int, reason: str) -> UserError:
    return UserError(
        f"cannot write {place}: {reason}, {free / 2**20:.1f} MiB are free",
        hint="what was saved before is untouched: free space and run the same command again",
    )
