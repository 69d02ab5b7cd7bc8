"""API keys: what a file may say, who a caller is, and a file that changes.

Proves:
- a key is known by its digest, whether the file has the key or the digest; the secret itself is kept nowhere;
- the two ways to send a key, and none, and a wrong one;
- patterns decide by key and by short name, and never by a part of a name;
- each mistake in a file is told with the file, the place and the reason, and never with a secret;
- a folder is read as a Secret is mounted, and again when the link that Kubernetes swaps is swapped;
- a changed file counts without a restart; a bad one keeps the old keys and is reported until it is good.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path

import pytest
from http_caller import until

from vllm_gateway.errors import GatewayError
from vllm_gateway.policy.keyring import Keyring
from vllm_gateway.policy.keys import ANONYMOUS, BadKeys, Caller, given_key, read_keys
from vllm_gateway.routing.table import Model
from vllm_gateway.settings import AuthSettings

ALICE = "sk-alice-0123456789"
BOB = "sk-bob-0123456789"
DIGEST = hashlib.sha256(BOB.encode()).hexdigest()
GOOD = f"""
keys:
- name: alice
  key: {ALICE}
  models: [llama, team-a/*]
  limits: {{requestsPerMinute: 60, tokensPerMinute: 1000, concurrency: 2}}
- name: bob
  sha256: {DIGEST.upper()}
"""


def write(path: Path, text: str = GOOD) -> Path:
    path.write_text(text)
    return path


def bearer(secret: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + secret.encode()}


def keyring(path: Path, *, anonymous: bool = False) -> Keyring:
    return Keyring(AuthSettings(keys_file=str(path), allow_anonymous=anonymous), poll=0.01)


def test_keys_are_known_by_their_digests(tmp_path: Path) -> None:
    keys = read_keys(write(tmp_path / "keys.yaml"))
    alice, bob = keys.caller_of(ALICE.encode()), keys.caller_of(BOB.encode())
    assert alice is not None
    assert bob is not None
    assert (alice.name, alice.limits.requests_per_minute, alice.limits.concurrency) == ("alice", 60, 2)
    assert (bob.name, bob.models, bob.limits.tokens_per_minute) == ("bob", ("*",), None)
    assert keys.caller_of(DIGEST.encode()) is None
    assert ALICE not in repr(keys._callers)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({b"authorization": b"Bearer abc"}, b"abc"),
        ({b"authorization": b"bearer  abc "}, b"abc"),
        ({b"x-api-key": b"abc"}, b"abc"),
        ({b"authorization": b"Basic abc", b"x-api-key": b"def"}, b"def"),
        ({b"authorization": b"Bearer "}, None),
        ({}, None),
    ],
)
def test_where_a_key_stands(headers: dict[bytes, bytes], expected: bytes | None) -> None:
    assert given_key(headers) == expected


def test_who_calls(tmp_path: Path) -> None:
    strict, open_too = keyring(write(tmp_path / "k")), keyring(tmp_path / "k", anonymous=True)
    assert strict.required
    assert not open_too.required
    assert strict.authenticate(bearer(ALICE)).name == "alice"
    assert open_too.authenticate({}) is ANONYMOUS
    for ring, headers, code in (
        (strict, {}, "missing_api_key"),
        (strict, bearer("sk-wrong"), "invalid_api_key"),
        (open_too, bearer("sk-wrong"), "invalid_api_key"),
        (strict, bearer("x" * 10_000), "invalid_api_key"),
        (strict, {b"authorization": b"Bearer \xff\xfe"}, "invalid_api_key"),
    ):
        with pytest.raises(GatewayError) as caught:
            ring.authenticate(headers)
        assert (caught.value.status, caught.value.code) == (401, code)


def test_without_a_file_everyone_may_call() -> None:
    assert Keyring(AuthSettings()).authenticate(bearer("sk-whatever-a-client-must-send")) is ANONYMOUS


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        (("*",), True),
        (("team-a/llama-8b",), True),
        (("team-a/*",), True),
        (("llama",), True),
        (("lla*",), True),
        (("team-a",), False),
        (("llama-8b",), False),  # a name of the resource alone is not one that callers use
        (("Llama",), False),
        (("team-b/*", "qwen"), False),
        ((), False),
    ],
)
def test_patterns(patterns: tuple[str, ...], allowed: bool) -> None:
    model = Model("llama-8b", "llama-8b", "team-a", served_names=("llama",))
    assert Caller("alice", patterns).may_use(model) is allowed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: [{name: a b, key: sk-secret-1}]", "keys.0.name"),
        ("keys: [{name: a}]", "exactly one of key and sha256"),
        (f"keys: [{{name: a, key: sk-secret-1, sha256: {DIGEST}}}]", "exactly one of key and sha256"),
        ("keys: [{name: a, key: short}]", "keys.0.key"),
        ("keys: [{name: anonymous, key: sk-secret-1}]", "those without a key"),
        ("keys: [{name: a, key: sk-secret-1, limit: 3}]", "keys.0: unknown setting"),
        ("keys: [{name: a, key: sk-secret-1, limits: {concurrency: 0}}]", "keys.0.limits.concurrency"),
        ("keys: [{name: a, sk-secret-1: x}]", "keys.0"),
        ("keys: [{name: a, key: sk-secret-1}, {name: a, key: sk-secret-2}]", "the name 'a' is taken"),
        ("keys: [{name: a, key: sk-secret-1}, {name: b, key: sk-secret-1}]", "has the key of another one"),
        ("keys: {name: a, key: sk-secret-1}", "keys"),
        ("- sk-secret-1", "settings"),
        ("", "is empty"),
        ("# nothing yet", "is empty"),
        ("other: 1", "keys: Field required"),
        ("keys:\n- [sk-secret-1", "not valid YAML (line 2)"),
        ("[" * 100_000, "not valid YAML"),
        ("a: &a [*a, sk-secret-1]\nkeys: *a", "keys"),
    ],
)
def test_mistakes_are_told_without_secrets(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadKeys) as caught:
        read_keys(write(tmp_path / "keys.yaml", text))
    assert words in str(caught.value)
    assert "keys.yaml" in str(caught.value)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("value", ["2024-13-01", "!!int x", "!!bool x", "!!timestamp x", "!!int ''"])
async def test_a_value_that_yaml_cannot_read_is_told_and_the_file_is_followed_on(
    tmp_path: Path, value: str
) -> None:
    path = write(tmp_path / "keys.yaml")
    ring = keyring(path)
    await ring.start()
    try:
        write(path, f"keys: [{{name: {value}, key: {BOB}}}]")
        await until(lambda: "not valid YAML" in ring.problem, 2)
        write(path, f"keys: [{{name: b, key: {BOB}}}]")
        await until(lambda: known(ring, BOB) and not known(ring, ALICE), 2)
    finally:
        await ring.stop()


def test_a_file_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(BadKeys, match="No such file"):
        keyring(tmp_path / "none.yaml")
    with pytest.raises(BadKeys, match="larger than"):
        read_keys(write(tmp_path / "big", " " * (4 * 1024 * 1024 + 1)))


async def test_a_folder_without_files_is_a_mistake_and_keeps_the_keys(tmp_path: Path) -> None:
    """A Secret whose entries were taken away. That nobody may come in is said by `keys: []`."""
    with pytest.raises(BadKeys, match="holds no file"):
        keyring(tmp_path)
    write(tmp_path / "keys.yaml")
    ring = keyring(tmp_path)
    (tmp_path / "keys.yaml").unlink()
    await followed(ring, lambda: "holds no file" in ring.problem)
    assert known(ring, ALICE)


async def test_a_folder_as_a_secret_is_mounted(tmp_path: Path) -> None:
    """`keys.yaml` -> `..data/keys.yaml`, `..data` -> `..<date>`; an update swaps the link `..data`."""
    for day, secret in (("..1", ALICE), ("..2", BOB)):
        (tmp_path / day).mkdir()
        write(tmp_path / day / "keys.yaml", f"keys: [{{name: a, key: {secret}}}]")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    ring = keyring(tmp_path)
    assert ring.authenticate(bearer(ALICE)).name == "a"
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    await followed(ring, lambda: known(ring, BOB) and not known(ring, ALICE))


async def test_a_changed_file_counts_and_a_bad_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys.yaml")
    ring = keyring(path)
    with caplog.at_level(logging.INFO, "vllm_gateway.keys"):
        write(path, "keys: [{name: eve, key: sk-eve-0123456789}, {}]")
        await followed(ring, lambda: bool(ring.problem))
        assert known(ring, ALICE)
        assert not known(ring, "sk-eve-0123456789")
        path.unlink()
        await followed(ring, lambda: "No such file" in ring.problem)
        assert known(ring, ALICE)
        write(path, "keys: [{name: eve, key: sk-eve-0123456789}]")
        await followed(ring, lambda: not ring.problem)
    assert known(ring, "sk-eve-0123456789")
    assert not known(ring, ALICE)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2  # each problem once, not once a poll


def known(ring: Keyring, secret: str) -> bool:
    try:
        return bool(ring.authenticate(bearer(secret)))
    except GatewayError:
        return False


async def followed(ring: Keyring, condition: object) -> None:
    """Runs the keyring until `condition` holds."""
    assert callable(condition)
    await ring.start()
    try:
        async with asyncio.timeout(2):
            while not condition():  # noqa: ASYNC110 - the file system has no event for us
                await asyncio.sleep(0.01)
    finally:
        await ring.stop()
