"""Is one of these keys in this request's headers. Knows nothing of routes or of what a key opens."""

import base64
import hashlib
import hmac
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import SecretStr
from starlette.datastructures import Headers

KEY_PROTOCOL = "limner.key."


def read_keys(key: SecretStr | None, file: Path | None) -> tuple[bytes, ...]:
    """One key from the environment and one from each line of a file; blank ones do not count."""
    lines = [key.get_secret_value()] if key is not None else []
    lines += file.read_text(encoding="utf-8").splitlines() if file is not None else []
    return tuple(line.strip().encode() for line in lines if line.strip())


def given_keys(headers: Headers) -> Iterator[bytes]:
    """What a request shows as its keys, in either header; other schemes of Authorization are none."""
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            yield key.strip().encode("latin-1")  # as the bytes came over the wire
    yield from (value.strip().encode("latin-1") for value in headers.getlist("x-api-key") if value.strip())


def protocol_keys(subprotocols: Iterable[str]) -> Iterator[bytes]:
    """What a WebSocket offers as `limner.key.<key in base64url>`: the one header that a web page can set there."""
    for offered in subprotocols:
        if offered.startswith(KEY_PROTOCOL):
            given = offered.removeprefix(KEY_PROTOCOL)
            try:
                yield base64.b64decode(given + "=" * (-len(given) % 4), altchars=b"-_", validate=True)
            except ValueError:
                yield b""  # a key, and none that anybody has


class Keys:
    """Holds digests, so that all comparisons are of one length and no key stays readable in memory dumps of this."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, given: bytes) -> bool:
        """Takes the same time whichever key it is, if any: all are compared, each in constant time."""
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)

    def are_in(self, headers: Headers) -> bool:
        """Whether a request shows one of them."""
        return any([key in self for key in given_keys(headers)])


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
