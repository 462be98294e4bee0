"""A port for processes to meet at; apart from processes.py because nothing heavy is imported for it."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Returns a TCP port on loopback that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
