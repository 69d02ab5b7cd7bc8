"""The fake Hub before the real client, huggingface_hub.

Proves: a snapshot has every file byte for byte, a large one from another host that refuses tokens; a second
one downloads nothing; a list of several pages is read whole; a download that breaks off goes on where it was;
each refusal is the client's own exception for it; slow files wait and then come; what was asked is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from hub_server import Grant, Hub, HubServer, Repo, hub_of
from huggingface_hub import errors

WEIGHTS = bytes(range(256)) * 20_000
FILES = {"config.json": b'{"a": 1}\n', "model.safetensors": WEIGHTS, "sub/vocab.txt": b"one\ntwo\n"}
TOKENS = {
    "all": Grant(frozenset({"acme/private", "acme/gated"})),
    "none": Grant(),
    "fine": Grant(frozenset({"acme/gated"}), gated=False),
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    repos = {
        "acme/open": Repo(FILES, revisions=("main", "v1")),
        "acme/private": Repo(FILES, private=True),
        "acme/gated": Repo(FILES, gated=True),
    }
    with HubServer(Hub(repos, TOKENS, page=2)) as server:
        server.hub = Hub(repos, TOKENS, page=2, cdn=server.url.replace("127.0.0.1", "localhost"))
        yield server
    huggingface_hub.close_session()


def snapshot(
    hub: HubServer,
    folder: Path,
    repo: str = "acme/open",
    token: str | bool = False,
    revision: str | None = None,
) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            repo, cache_dir=folder, endpoint=hub.url, token=token, revision=revision
        )
    )


def large(hub: HubServer) -> list[str]:
    return [asked.path for asked in hub.asked if asked.path.startswith("/cdn/")]


@pytest.mark.parametrize(
    ("repo", "token"), [("acme/open", False), ("acme/private", "all"), ("acme/gated", "all")]
)
def test_a_snapshot_has_every_file(hub: HubServer, tmp_path: Path, repo: str, token: str | bool) -> None:
    folder = snapshot(hub, tmp_path, repo, token=token)
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert folder.name == hub.hub.repos[repo].commit
    on_the_hub = [asked for asked in hub.asked if not asked.path.startswith("/cdn/")]
    assert {asked.with_token for asked in on_the_hub} == {bool(token)}
    assert all("hf_hub" in asked.agent for asked in hub.asked)


def test_a_second_snapshot_downloads_nothing(hub: HubServer, tmp_path: Path) -> None:
    snapshot(hub, tmp_path)
    assert len(large(hub)) == 1
    hub.asked.clear()
    snapshot(hub, tmp_path, revision="v1")  # another name of the same commit
    assert [asked.path for asked in hub.asked] == ["/api/models/acme/open/revision/v1"]


def test_the_list_and_its_sizes_are_read_whole(hub: HubServer) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.url, token=False)
    listed = {item.path: getattr(item, "size", 0) for item in api.list_repo_tree("acme/open", recursive=True)}
    assert listed == {path: len(content) for path, content in FILES.items()}
    info = api.model_info("acme/open", files_metadata=True)
    assert {item.rfilename: item.size for item in info.siblings or ()} == listed
    assert (info.sha, info.private, info.gated) == (hub.hub.repos["acme/open"].commit, False, False)


def test_what_breaks_off_goes_on_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    hub.cuts.append(1000)
    folder = snapshot(hub, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert len(large(hub)) == 2


@pytest.mark.parametrize(
    ("repo", "more", "error"),
    [
        ("acme/none", {}, errors.HfHubHTTPError),  # over https it would be RepositoryNotFoundError
        ("acme/none", {"token": "all"}, errors.RepositoryNotFoundError),
        ("acme/private", {}, errors.HfHubHTTPError),
        ("acme/private", {"token": "none"}, errors.RepositoryNotFoundError),
        ("acme/open", {"token": "unknown"}, errors.HfHubHTTPError),
        ("acme/open", {"revision": "v9"}, errors.RevisionNotFoundError),
        ("acme/gated", {}, errors.GatedRepoError),
        ("acme/gated", {"token": "none"}, errors.GatedRepoError),
        ("acme/gated", {"token": "fine"}, errors.LocalEntryNotFoundError),
    ],
)
def test_each_refusal_is_the_clients_own(
    hub: HubServer, tmp_path: Path, repo: str, more: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        snapshot(hub, tmp_path, repo, **more)


def test_a_file_that_is_not_there_is_told_apart(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(errors.RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download("acme/open", "no.json", cache_dir=tmp_path, endpoint=hub.url)


def test_slow_files_wait_and_then_come(hub: HubServer) -> None:
    path = f"{hub.url}/cdn/acme/open/x/model.safetensors"
    httpx.put(f"{hub.url}/-/slow")
    with httpx.stream("GET", path) as answer:
        parts = answer.iter_raw()
        assert next(parts) == WEIGHTS[:1]
        httpx.delete(f"{hub.url}/-/slow")
        assert len(b"".join(parts)) == len(WEIGHTS) - 1


def test_it_can_be_told_in_json_and_tells_what_was_asked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = {
        "repos": {"acme/told": {"folder": str(tmp_path), "add": {"a/b.txt": "b"}, "private": True}},
        "tokens": {"t": {"repos": ["acme/told"]}},
    }
    with HubServer(hub_of(told)) as server:
        address = f"{server.url}/api/models/acme/told"
        info = httpx.get(address, headers={"Authorization": "Bearer t", "User-Agent": "test"}).json()
        listed = httpx.get(f"{server.url}/-/requests").json()
    assert {item["rfilename"] for item in info["siblings"]} == {"config.json", "a/b.txt"}
    assert listed == [{"method": "GET", "path": "/api/models/acme/told", "with_token": True, "agent": "test"}]
