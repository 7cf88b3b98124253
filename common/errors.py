"""The one exception for what a user can fix."""

from __future__ import annotations

import re

# Keys that exist once per step, as code that knows no step writes them in its messages.
_STEP_KEY = re.compile(
    r"(?<![\w./-])(?=(?:data\.(?:path|sources|max_length|packing|truncation|eval_\w+|on_bad_row|max_bad_rows|cache_dir|stage_split)"
    r"|train\.(?:\w+_batch_size|epochs|max_steps|\w+_every|save_minutes|async_save|keep_checkpoints)"
    r"|optim\.\w+|sampling\.\w+)\b)"
)


def with_step(text: str, step: str) -> str:
    """The step's name before the keys of its part: `data.path` -> `sft.data.path`."""
    return _STEP_KEY.sub(f"{step}.", text)


class UserError(Exception):
    """Something the user can fix: what was found, what was expected, how to get out.

    Printed without a traceback; the program ends with exit status 2. Give the place (file and
    line, or key and value) in `message` and the way out in `hint`.
    """

    EXIT_CODE = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def in_step(self, step: str) -> UserError:
        """The same error with the step's name before the keys of its part."""
        hint = None if self.hint is None else with_step(self.hint, step)
        return type(self)(with_step(self.message, step), hint=hint)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"
