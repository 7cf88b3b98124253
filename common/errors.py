"""The one exception for what a user can fix."""


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

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"
