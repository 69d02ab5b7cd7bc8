"""What the prefetch Job runs, as it runs it, with the client of the engine's image, before a fake Hub.

Proves: the client is the engine's; the plan tells size and files, without the formats that vLLM leaves out; a
fetch leaves a cache from which everything is found offline, writable by the engine's group; what is there is
not fetched again; each refusal ends with its own code and says who refuses, with or without a token; a full
cache is found before the download; a Hub that is away, or something else that answers, may pass; a token is
never said.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Grant, Hub, HubServer, Repo
from own_port import OwnPort

from vllm_operator.observe.engine_log import scrub
from vllm_operator.render.prefetch_script import NO_REVISION, NO_SPACE, NOT_FOUND, REFUSED, SCRIPT

ENGINE = Path(__file__).parents[2] / "k8s" / "local" / "vllm-cpu" / "requirements.txt"
WANTED = {"config.json": b"{}", "model.safetensors": bytes(3_000_000), "tokenizer.json": b"[]"}
LEFT_OUT = {
    "pytorch_model.bin": bytes(5_000_000),
    "original/consolidated.00.pth": b"x",
    "rust_model.ot": b"y",
}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a", "adapter_model.bin": b"b"}
REPOS = {
    "acme/small": Repo({**WANTED, **LEFT_OUT}, revisions=("main", "v1")),
    "acme/lora": Repo(ADAPTER),
    "acme/private": Repo(WANTED, private=True),
    "acme/gated": Repo(WANTED, gated=True),
    "acme/huge": Repo(WANTED, claimed={"model.safetensors": 10**17}),
}
TOKENS = {
    "hf_all": Grant(frozenset({"acme/private", "acme/gated"})),
    "hf_none": Grant(),
    "hf_fine": Grant(frozenset({"acme/gated"}), gated=False),
}


@dataclass
class Job:
    """Runs a step as the Job's container does."""

    endpoint: str
    folder: Path

    def run(self, step: str, *asked: str, token: str = "") -> tuple[int, str]:
        """The exit code, and the termination message, which is the last line of the output too."""
        said = self.folder / "termination-log"
        said.write_text("")
        env = {
            "PATH": os.environ["PATH"],
            "HF_HOME": str(self.folder / "cache" / "huggingface"),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TERMINATION_LOG": str(said),
            **({"HF_TOKEN": token} if token else {}),
        }
        command = [sys.executable, "-c", SCRIPT, step, *asked]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        message = said.read_text()
        assert message or done.returncode == 0, done.stderr
        assert not token or token not in message + done.stdout + done.stderr
        return done.returncode, message


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(Hub(REPOS, TOKENS)) as server:
        server.hub = Hub(REPOS, TOKENS, cdn=server.url.replace("127.0.0.1", "localhost"))
        yield server


@pytest.fixture
def job(hub: HubServer, tmp_path: Path) -> Job:
    return Job(hub.url, tmp_path)


def test_the_client_is_the_engines() -> None:
    assert f"\nhuggingface-hub=={huggingface_hub.__version__} " in ENGINE.read_text()


def fetched(hub: HubServer) -> list[str]:
    return [asked.path.rsplit("/", 1)[1] for asked in hub.asked if asked.path.startswith("/cdn/")]


def test_a_model_is_planned_fetched_and_then_found_offline(job: Job, hub: HubServer) -> None:
    assert job.run("plan", "acme/small@v1") == (0, "0.0 GB in 3 files")
    assert fetched(hub) == []
    assert job.run("fetch", "acme/small@v1") == (0, "")
    assert fetched(hub) == ["model.safetensors"]
    cache = job.folder / "cache" / "huggingface" / "hub"
    folder = Path(
        huggingface_hub.snapshot_download(
            "acme/small", revision="v1", cache_dir=cache, local_files_only=True, ignore_patterns="*"
        )
    )  # as vLLM looks for it, offline
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == WANTED
    written = [path for path in (job.folder / "cache").rglob("*") if not path.is_symlink()]
    assert [path for path in written if path.is_dir() and not path.stat().st_mode & 0o020] == []
    assert [path for path in written if path.parent.name == "blobs" and not path.stat().st_mode & 0o040] == []
    hub.asked.clear()
    assert job.run("plan", "acme/small@v1") == (0, "0.0 GB in 3 files, 0.0 GB of it there already")
    assert job.run("fetch", "acme/small@v1") == (0, "")
    assert fetched(hub) == []


def test_an_adapter_is_fetched_whole(job: Job, hub: HubServer) -> None:
    assert job.run("fetch", "acme/lora") == (0, "")
    assert sorted(fetched(hub)) == ["adapter_model.bin", "adapter_model.safetensors"]


def test_what_breaks_off_is_gone_on_with(job: Job, hub: HubServer) -> None:
    hub.cuts.append(1_000_000)
    assert job.run("fetch", "acme/small") == (0, "")
    assert fetched(hub) == ["model.safetensors"] * 2


@pytest.mark.parametrize(
    ("step", "asked", "token", "code", "words"),
    [
        ("plan", "acme/small@v9", "", NO_REVISION, "has no such revision of acme/small@v9"),
        ("plan", "acme/none", "", NOT_FOUND, "has no acme/none, or does not show it without a token"),
        ("plan", "acme/none", "hf_all", NOT_FOUND, "has no acme/none, or does not show it with the token"),
        ("plan", "acme/private", "hf_none", NOT_FOUND, "does not show it with the token given"),
        ("plan", "acme/small", "hf_bad", REFUSED, "answers 401 with the token given"),
        ("plan", "acme/huge", "", NO_SPACE, "free, and 100000000.0 GB are to come"),
        (
            "fetch",
            "acme/gated",
            "",
            REFUSED,
            "refuses acme/gated without a token; its terms must be accepted",
        ),
        ("fetch", "acme/gated", "hf_none", REFUSED, "with the token given; its terms must be accepted"),
        ("fetch", "acme/gated", "hf_fine", REFUSED, "403 Forbidden: This fine-grained token may not read"),
    ],
)
def test_each_refusal_has_its_code_and_says_who_refuses(
    job: Job, step: str, asked: str, token: str, code: int, words: str
) -> None:
    ended, said = job.run(step, asked, token=token)
    assert (ended, words in said) == (code, True), said
    assert scrub(said) == said  # or the status would say "token: [redacted]"
    assert said.startswith("127.0.0.1 (HF_ENDPOINT) " if code != NO_SPACE else "the cache has ")


def test_private_and_gated_ones_come_with_their_token(job: Job, hub: HubServer) -> None:
    assert job.run("fetch", "acme/private", "acme/gated", token="hf_all") == (0, "")
    assert fetched(hub) == ["model.safetensors"] * 2


def test_what_is_not_the_models_fault_may_pass(job: Job, tmp_path: Path) -> None:
    code, said = Job(f"http://127.0.0.1:{OwnPort().number}", tmp_path).run("plan", "acme/small")
    assert code == 1
    assert said.startswith("127.0.0.1 (HF_ENDPOINT): ConnectError")
    for address in ("portal", "elsewhere"):
        code, said = Job(f"{job.endpoint}/{address}", tmp_path).run("plan", "acme/small")
        assert (code, said) == (1, "127.0.0.1 (HF_ENDPOINT) does not answer as a Hub does: check HF_ENDPOINT")
