"""What rewards can be told: the sources of `ppo.rewards`, and what may name a function or a server.

Raises a UserError for what cannot work. Imports neither numpy nor functions and connects to nothing, so that
the controller checks the same before anything is launched or written.
"""

from dataclasses import dataclass
from typing import Optional
from urllib.parse import SplitResult

from common import addresses
from common.errors import UserError
from common.fields import number

FORM = "package.module:function(prompts, completions, **columns) -> list[float]"
"""Signature of a function that scores responses."""
TOKEN = "RLHF_REWARD_TOKEN"  # noqa: S105 - its name
"""Environment variable with the bearer token for a server."""
FIRST_PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""
LONGEST_PAUSE = 60.0
"""Seconds; pauses grow no further: with twenty retries they would come to days."""
REQUESTS_AT_ONCE = 4
"""In flight to a server from each rank, where `concurrency` says nothing."""
GROWING = 6
"""Number of growing pauses: 1, 2, 4, 8, 16 and 32 seconds."""
SERVER = addresses.Words(
    example="https://rewards.example/score",
    sends="prompts and completions",
    instead=f"take it out of the URL and set the environment variable {TOKEN}, sent as a bearer token",
    if_plain="use https, a server on this machine, or allow it beside the url: allow_http: true",
)


@dataclass
class RewardSourceConfig:
    """One of the rewards that are summed: exactly one of model, function and url."""

    model: bool = False
    """the reward model, calibrated to mean 0 and standard deviation 1 on its held-out pairs"""
    function: Optional[str] = None
    """package.module:function(prompts, completions, **columns) -> list[float]"""
    url: Optional[str] = None
    """server that answers {prompts, completions, columns} with {rewards: [...]} (token: RLHF_REWARD_TOKEN)"""
    weight: float = number(1.0, -1_000_000, 1_000_000)
    """factor in the sum"""
    name: Optional[str] = None
    """how it is called in the metrics; by default reward_model, the function's name, or the server's host"""
    timeout: float = number(30.0, 0, 86_400, above=True)
    """seconds until a server's answer is given up"""
    retries: int = number(4, 0, 1_000)
    """further attempts at a server that does not answer; then the run stops"""
    concurrency: Optional[int] = number(None, 1, 256)
    """calls at once on each rank, each with whole groups; by default 4 of a server, 1 of a function"""
    allow_http: bool = False
    """let prompts and completions travel unencrypted to a server that is not this machine"""

    @property
    def calls_at_once(self) -> int:
        return self.concurrency or (REQUESTS_AT_ONCE if self.url is not None else 1)

    def check(self, at: str) -> None:
        """One thing scores, and it can be named."""
        named = [self.model, self.function is not None, self.url is not None]
        if sum(named) != 1:
            raise UserError(
                f"{at[:-1]} names " + ("nothing to score with" if not any(named) else "several"),
                hint="'ppo.rewards=[{model: true}]', 'ppo.rewards=[{function: package.module:function}]' "
                """or 'ppo.rewards=[{url: "https://…"}]'""",
            )
        if self.function is not None:
            check_reference(self.function, f"{at}function")
        if self.url is not None:
            check_url(self.url, f"{at}url", allow_http=self.allow_http)


def check_reference(reference: str, key: str) -> None:
    """UserError unless the text has the form package.module:function. Imports nothing."""
    module, colon, function = reference.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *function.split(".")]):
        dotted = module.rpartition(".")
        plain = not colon and all(part.isidentifier() for part in (dotted[2], *dotted[0].split(".")))
        way = f"did you mean {dotted[0]}:{dotted[2]}?" if plain else f"expected: {FORM}"
        raise UserError(f"{key}={reference} does not name a function", hint=way)


def check_url(url: str, key: str, *, allow_http: bool) -> SplitResult:
    """The parts of an allowed URL of a reward server; UserError naming `key` for any other."""
    return addresses.check_url(url, key, SERVER, allow_http=allow_http)


def longest_wait(timeout: float, retries: int) -> float:
    """The most seconds that a server of `ppo.rewards` may take, until its answer or the error.

    Every attempt takes its timeout and every pause its length. A pause that the server asks for (Retry-After)
    ends within the time of all attempts; further attempts may follow it.
    """
    growing = min(retries, GROWING)
    pauses = FIRST_PAUSE * (2.0**growing - 1) + LONGEST_PAUSE * (retries - growing)
    return timeout * (2 * retries + 1) + pauses
