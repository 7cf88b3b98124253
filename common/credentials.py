"""Whether a credential is at hand, for the step that uses it and for the controller that says so beforehand.

Takes an environment; returns an answer, never the credential itself. Asks nothing over the network.
"""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from urllib.parse import urlsplit


def has_wandb_key(server: str, environ: Mapping[str, str]) -> bool:
    """Whether a key for `server` is at hand: in the environment or in the netrc file."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        entries = netrc.netrc(environ.get("NETRC"))  # ~/.netrc is refused where others may read it
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(server).netloc) is not None
