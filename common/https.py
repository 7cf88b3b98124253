"""Connections to servers over https, and plain http to this machine, with nothing but the standard library.

Knows nothing of what is asked. https goes through the environment's proxy (`https_proxy`, `no_proxy`); this
machine and plain http are always reached directly.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from common.addresses import is_this_machine
from common.errors import UserError


def connection_to(parts: SplitResult, timeout: float) -> http.client.HTTPConnection:
    """To a server, not connected yet; https to another machine goes through the environment's proxy."""
    host = parts.hostname or ""
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, parts.port, timeout=timeout)
    context = ssl.create_default_context()
    proxy = None if is_this_machine(host) or proxy_bypass(host) else getproxies().get("https")
    if not proxy:
        return http.client.HTTPSConnection(host, parts.port, timeout=timeout, context=context)
    through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = http.client.HTTPSConnection(
        through.hostname or "", through.port or 80, timeout=timeout, context=context
    )
    connection.set_tunnel(host, parts.port, headers=_proxy_credentials(through))
    return connection


def certificate_error(named: str, error: ssl.SSLCertVerificationError) -> UserError:
    """Of a server that is called `named`."""
    return UserError(
        f"{named} has no certificate that holds: {error.verify_message}",
        hint="SSL_CERT_FILE names the certificates that are trusted",
    )


def hang_up(connection: http.client.HTTPConnection) -> None:
    """End what another thread is doing with the connection."""
    if (connected := connection.sock) is not None:
        with contextlib.suppress(OSError):  # closed by now
            # not SSLSocket.shutdown, which would take TLS away under the thread that reads
            socket.socket.shutdown(connected, socket.SHUT_RDWR)


def target(parts: SplitResult) -> str:
    """What is asked for in the first line of a request."""
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _proxy_credentials(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(pair.encode()).decode("ascii")}
