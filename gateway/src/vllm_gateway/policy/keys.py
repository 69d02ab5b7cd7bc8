"""API keys: a YAML file, or a folder of them as a Secret is mounted, kept as SHA-256 digests.

    keys:
    - name: alice                      # what metrics and logs say
      key: sk-alice-…                  # or sha256: <64 hex digits>, so that the file holds no secret
      models: [llama-8b, team-a/*]     # default: every model
      limits: {requestsPerMinute: 60, tokensPerMinute: 20000, concurrency: 8}

A key of a caller is looked up by its digest: no comparison of secrets takes place whose time could tell how
much of one was right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass as checked

from vllm_gateway.routing.table import Model
from vllm_gateway.settings import NOT_YAML, BadSettings, describe_errors

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_KEYS = 10_000
_MAX_KEY_LENGTH = 512

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._@-]{0,62}[A-Za-z0-9])?$")]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Secret = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{8,512}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]


_CONFIG = ConfigDict(
    extra="forbid", alias_generator=to_camel, populate_by_name=True, hide_input_in_errors=True
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, **_CONFIG)


@checked(frozen=True, slots=True, kw_only=True, config=_CONFIG)
class KeyLimits:
    """What one key may use; absent is not limited. Tokens are prompt and completion together."""

    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None


class _Key(_Part):
    name: Name
    key: Secret | None = None
    sha256: Digest | None = None
    models: tuple[Pattern, ...] = ("*",)
    limits: KeyLimits = KeyLimits()

    @model_validator(mode="after")
    def _one_secret(self) -> _Key:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give exactly one of key and sha256")
        if self.name == ANONYMOUS_NAME:
            raise ValueError(f"{ANONYMOUS_NAME!r} is the name of those without a key")
        return self

    def digest(self) -> str:
        return self.sha256.lower() if self.sha256 is not None else _digest((self.key or "").encode())


class _File(_Part):
    keys: tuple[_Key, ...]


ANONYMOUS_NAME = "anonymous"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. `models` are patterns of model keys and short names; `*` stands for any characters."""

    name: str
    models: tuple[str, ...] = ("*",)
    limits: KeyLimits = field(default_factory=KeyLimits)

    def may_use(self, model: Model) -> bool:
        """Whether a pattern fits `<namespace>/<name>` or a short name of the model."""
        if "*" in self.models:
            return True
        names = (model.key, *model.served_names)
        return any(fnmatchcase(name, pattern) for pattern in self.models for name in names)

    def permitted(self, models: Iterable[Model]) -> tuple[Model, ...]:
        return tuple(model for model in models if self.may_use(model))


ANONYMOUS = Caller(ANONYMOUS_NAME)


class BadKeys(BadSettings):
    """One line for a person: which file, which key, what is wrong. Never a secret."""


class Keys:
    """Callers by the digests of their keys. Immutable: a changed file gives a new one. `names` has those of
    all that may call, also of who has no key.
    """

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        self._callers = callers
        self.names = frozenset(caller.name for caller in callers.values()) | {ANONYMOUS_NAME}

    def __len__(self) -> int:
        return len(self._callers)

    def caller_of(self, secret: bytes) -> Caller | None:
        """The caller who has this key."""
        return self._callers.get(_digest(secret)) if len(secret) <= _MAX_KEY_LENGTH else None


def given_key(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The key of a request: `Authorization: Bearer …` (OpenAI) or `x-api-key` (Anthropic); None without."""
    scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and value.strip():
        return value.strip()
    return headers.get(b"x-api-key", b"").strip() or None


def read_keys(path: Path) -> Keys:
    """The keys of a file, or of every file of a folder. Raises BadKeys."""
    callers: dict[str, Caller] = {}
    names: set[str] = set()
    files = list(_files(path))
    if not files:  # a Secret that lost its entries: never the wish to let nobody in
        raise BadKeys(f"{path} holds no file; write 'keys: []' into one for no keys")
    for file in files:
        for index, key in enumerate(_parse(file).keys):
            if key.name in names:
                raise BadKeys(f"{file}: keys.{index}: the name {key.name!r} is taken")
            if key.digest() in callers:
                raise BadKeys(f"{file}: keys.{index}: {key.name!r} has the key of another one")
            names.add(key.name)
            callers[key.digest()] = Caller(key.name, key.models, key.limits)
    if len(callers) > MAX_KEYS:
        raise BadKeys(f"{path}: {len(callers)} keys, at most {MAX_KEYS}")
    return Keys(callers)


def signature(path: Path) -> object:
    """Changes whenever what `read_keys` reads may have changed. Raises BadKeys."""
    try:
        stats = [(str(file), file.stat()) for file in _files(path)]
    except OSError as error:
        raise BadKeys(f"{path}: {error.strerror}") from error
    return [(name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats]


def _files(path: Path) -> Iterator[Path]:
    """A mounted Secret has its files as links, beside folders whose names begin with two dots."""
    if not path.is_dir():
        yield path
        return
    try:
        found = sorted(path.iterdir())
    except OSError as error:
        raise BadKeys(f"{path}: {error.strerror}") from error
    yield from (file for file in found if not file.name.startswith(".") and not file.is_dir())


def _parse(file: Path) -> _File:
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadKeys(f"{file}: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        raise BadKeys(f"{file} is larger than {MAX_FILE_BYTES} bytes")
    try:
        document = yaml.safe_load(text)
        if document is None:  # as while somebody writes it: never the wish to let nobody in
            raise BadKeys(f"{file} is empty; write 'keys: []' for no keys")
        return _File.model_validate(document)
    except ValidationError as error:
        raise BadKeys(f"{file}: {describe_errors(error, with_values=False)}") from None
    except (yaml.YAMLError, *NOT_YAML) as error:
        # Without the parser's words: they quote the line, which may hold a key.
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise BadKeys(f"{file} is not valid YAML{where}") from None


_SHA256 = hashlib.sha256()


def _digest(secret: bytes) -> str:
    digest = _SHA256.copy()  # OpenSSL looks for the algorithm's code with each new one
    digest.update(secret)
    return digest.hexdigest()
