"""The key that each engine asks its callers for, derived from one master key; nothing else is stored.

The gateway derives the same: docs/architecture.md. The master key is a Secret of the operator's own
namespace, made by the operator where there is none: a template of a chart cannot make a random value once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import secrets
from typing import Protocol

from vllm_operator.api.v1alpha1 import Metadata
from vllm_operator.errors import ApiError, Conflict, NotFound, SettingsError
from vllm_operator.kinds import SECRETS, Body, Kind, ObjectKey

log = logging.getLogger(__name__)

MASTER_FIELD = "key"
MIN_MASTER_BYTES = 32


class SecretApi(Protocol):
    async def get(self, kind: Kind, key: ObjectKey) -> Body: ...

    async def create(self, kind: Kind, body: Body) -> Body: ...


def engine_key(master: bytes, namespace: str, name: str, uid: str) -> str:
    """64 hexadecimal digits: HMAC-SHA256 of `namespace/name/uid`. A model made anew gets another key."""
    return hmac.new(master, f"{namespace}/{name}/{uid}".encode(), hashlib.sha256).hexdigest()


class EngineKeys:
    """The master key in memory. `of` is empty where `secret` is: then engines ask for no key."""

    def __init__(self, api: SecretApi, secret: ObjectKey | None) -> None:
        self._api, self._secret = api, secret
        self._master = b""

    def of(self, meta: Metadata) -> str:
        return engine_key(self._master, meta.namespace, meta.name, meta.uid) if self._master else ""

    async def ensure(self) -> bool:
        """Reads the Secret or makes it; True if the key is another than before. One that was deleted comes
        back with the key that it had, so that no model rolls out for it. Raises ApiError, or SettingsError
        for a Secret without a usable key.
        """
        if self._secret is None:
            return False
        before = self._master
        try:
            self._master = master_of(await self._api.get(SECRETS, self._secret))
        except NotFound:
            await self._create(self._secret)
        return self._master != before

    async def _create(self, secret: ObjectKey) -> None:
        master = self._master or secrets.token_hex(MIN_MASTER_BYTES).encode()
        try:
            self._master = master_of(await self._api.create(SECRETS, master_manifest(secret, master)))
        except Conflict:  # the next call reads what another made meanwhile
            raise ApiError(409, "Conflict", f"Secret {secret.name} was just made by another") from None
        log.info("created", extra={"kind": "Secret", "name_of_secret": secret.name})


def master_of(body: Body) -> bytes:
    """Raises SettingsError where the Secret has no key of 32 bytes or more."""
    name = body["metadata"]["name"]
    try:
        master = base64.b64decode((body.get("data") or {})[MASTER_FIELD], validate=True).strip()
    except (KeyError, binascii.Error):
        raise SettingsError(f"Secret {name} has no field {MASTER_FIELD}") from None
    if len(master) < MIN_MASTER_BYTES:
        raise SettingsError(f"Secret {name}: {MASTER_FIELD} is shorter than {MIN_MASTER_BYTES} bytes")
    return master


def master_manifest(secret: ObjectKey, master: bytes) -> Body:
    return {
        "apiVersion": SECRETS.api_version,
        "kind": SECRETS.kind,
        "metadata": {
            "name": secret.name,
            "namespace": secret.namespace,
            "labels": {
                "app.kubernetes.io/managed-by": "vllm-operator",
                "app.kubernetes.io/part-of": "vllm-fleet",
            },
        },
        "data": {MASTER_FIELD: base64.b64encode(master).decode()},
    }
