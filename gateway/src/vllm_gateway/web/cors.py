"""Cross-origin headers (https://fetch.spec.whatwg.org/#http-cors-protocol), for both paths of an answer."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_gateway.settings import Cors

Headers = list[tuple[bytes, bytes]]

_EXPOSED = (b"access-control-expose-headers", b"x-request-id, retry-after, x-cache")
_ANY = "*"


class CorsPolicy:
    """Which origin may read answers. Computed once, asked once a request."""

    def __init__(self, cors: Cors) -> None:
        self._origins = frozenset(origin.encode() for origin in cors.allow_origins)
        self._any_origin = _ANY in cors.allow_origins
        self._credentials = cors.allow_credentials
        self._any_header = _ANY in cors.allow_headers
        self._headers = ", ".join(cors.allow_headers).encode()
        self._methods = ", ".join(cors.allow_methods).encode()
        self._max_age = b"%d" % int(cors.max_age)

    def headers(self, request: Mapping[bytes, bytes]) -> Headers:
        """What an answer to `request` carries; nothing for one that came from no other origin."""
        origin = request.get(b"origin")
        if origin is None:
            return []
        if self._any_origin and not self._credentials:
            return [(b"access-control-allow-origin", b"*"), _EXPOSED]
        if not self._any_origin and origin not in self._origins:
            return [(b"vary", b"origin")]
        allowed = [(b"access-control-allow-origin", origin), (b"vary", b"origin"), _EXPOSED]
        if self._credentials:
            allowed.append((b"access-control-allow-credentials", b"true"))
        return allowed

    def preflight(self, request: Mapping[bytes, bytes]) -> Headers:
        """The answer to OPTIONS. `*` for headers would not cover Authorization, so they are echoed."""
        asked = request.get(b"access-control-request-headers", b"")
        return [
            (b"access-control-allow-methods", self._methods),
            (b"access-control-allow-headers", asked if self._any_header else self._headers),
            (b"access-control-max-age", self._max_age),
        ]


def is_preflight(method: str, request: Mapping[bytes, bytes]) -> bool:
    return method == "OPTIONS" and b"origin" in request and b"access-control-request-method" in request
