"""Showing each other that client and server run under one kernel."""

from __future__ import annotations

import hmac
from functools import cache
from pathlib import Path

__all__ = ["NONCE_BYTES", "host_proof", "is_host_proof"]

#: Bytes of a nonce that this project sends; others may send from 16 to 64.
NONCE_BYTES = 32

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def _boot_id() -> bytes:
    """A kernel draws it anew whenever it starts, and only those who run under it can read it; containers share their host's, virtual machines
    have their own. It is used as a key and never sent: machine-id(5) asks the same for its kin."""
    try:
        return _BOOT_ID.read_text().strip().encode()
    except OSError:
        return b""


def host_proof(side: str, nonce: bytes) -> bytes:
    """``host_proof`` of a MapDataset request (``side="client"``) or response (``"server"``).

    Empty where the system has no boot id, or the nonce is none: then nothing is ever proven.
    """
    key = _boot_id()
    if not key or not 16 <= len(nonce) <= 64:
        return b""
    return hmac.digest(key, f"ome-tensor map v1 {side}\0".encode() + nonce, "sha256")


def is_host_proof(side: str, nonce: bytes, proof: bytes) -> bool:
    """Whether the other side has shown that it runs under this kernel."""
    wanted = host_proof(side, nonce)
    return bool(wanted) and hmac.compare_digest(wanted, proof)
