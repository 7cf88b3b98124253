"""Data sets on the hub: which paths name one, and the commit that a branch of one is at.

Asks the hub for nothing but the commit; `common/data/saved.py` reads the rows.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from common.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")


def is_name(path: str) -> bool:
    """Whether `path` is written as `name` or `owner/name`, and is no misspelt path of a file."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        return False
    # `demo/data` with a folder `demo` here is a misspelt folder, not somebody's data set
    return "/" not in path or not Path(path).parent.exists()


@functools.lru_cache
def commit_of(path: str, revision: str | None, key: str = "data.path") -> str:
    """The commit that is meant; the hub is asked, once in a process, where that is not a commit already."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(path, revision=revision).sha
    except Exception as error:  # the client raises a dozen kinds for "not there" and "no network"
        raise unreachable(path, key, error) from error
    if found is None:
        raise unreachable(path, key, RuntimeError("the hub names no commit"))
    return found


def unreachable(path: str, key: str, error: Exception) -> UserError:
    """What is said of a data set that cannot be had."""
    return UserError(
        f"{key}={path}: no such file here, and the hub data set could not be loaded: {reason_of(error)}",
        hint="check the name, subset, revision and split; without a network, download it first and give"
        " data.path its folder",
    )


def reason_of(error: Exception) -> str:
    """What an error of the hub's libraries says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
