"""How long a reward server is waited for. Leaf: the controller reckons with it before a launch."""

FIRST_PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""
LONGEST_PAUSE = 60.0
"""Seconds at which pauses stop growing: with twenty retries they would come to days."""
GROWING = 6
"""Pauses until then: 1, 2, 4, 8, 16 and 32 seconds."""


def longest_wait(timeout: float, retries: int) -> float:
    """Seconds that a server of `ppo.rewards` may take in all, until its answer or the error.

    Every attempt takes its timeout and every pause its length. A server that asks to be left alone may do so
    until the attempts' time is over; that, too, may come before the last ones.
    """
    growing = min(retries, GROWING)
    pauses = FIRST_PAUSE * (2.0**growing - 1) + LONGEST_PAUSE * (retries - growing)
    return timeout * (2 * retries + 1) + pauses
