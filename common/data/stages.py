"""`data.stage_split`: which step of the pipeline a row belongs to.

Steps that read one data set each see a part of their own, as in DeepSpeed-Chat's 2/4/4 split. A row's
part follows from the seed and from what its user asks first, so that demonstrations and preferences with
the same question agree, whatever their formats. Pure; counts nothing and drops nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from common.errors import UserError

OTHER_STAGE = "of another step (data.stage_split)"
"""Why a row is left out, in the ledger."""


class StageSplit:
    """shares: of each step by name, in any unit. stage: the step whose rows are wanted.

    An empty mapping gives every row to every step. Raises UserError for a step without a share.
    """

    def __init__(self, shares: Mapping[str, float], stage: str | None, seed: int) -> None:
        if shares and stage not in shares:
            found = ", ".join(f"{name}: {share:g}" for name, share in shares.items())
            raise UserError(
                f"data.stage_split={{{found}}} has no share for this step, {stage}",
                hint=f"add it, e.g. data.stage_split.{stage}=1, or leave data.stage_split empty",
            )
        self._shares = dict(sorted(shares.items()))  # however a config orders them
        self._stage = stage
        self._key = f"stage_split {seed}".encode()[:64]

    def has(self, question: str) -> bool:
        """Whether rows that ask this belong to the step. White space around it does not matter."""
        return not self._shares or self.stage_of(question) == self._stage

    def stage_of(self, question: str) -> str:
        """The step that such rows belong to."""
        digest = hashlib.blake2b(question.strip().encode(), digest_size=8, key=self._key).digest()
        at = int.from_bytes(digest, "big") / 2**64 * sum(self._shares.values())
        for name, share in self._shares.items():
            at -= share
            if at < 0:
                return name
        return name  # rounding, at the very end
