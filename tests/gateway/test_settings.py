"""Settings: file, environment, flags; and what a person sees who got one wrong.

Proves: a flag beats the environment beats the file; unknown keys and bad values are one line that names the
setting, with exit code 2; --help and --version work without configuration; a taken port is one line.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gateway.__main__ import parse_settings
from vllm_gateway.settings import BadSettings, Settings, load, parse_duration


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        key: value for key, value in os.environ.items() if key not in ("VLLM_URL", "CONFIG_FILE", "PORT")
    }
    command = [sys.executable, "-m", "vllm_gateway", *arguments]
    return subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, timeout=30, check=False
    )


def test_a_flag_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("port: 1\nmanagementPort: 1\nhost: h1\ndrainTimeout: 1m30s\n")
    environment = {
        "CONFIG_FILE": str(file),
        "PORT": "2",
        "MANAGEMENT_PORT": "2",
        "VLLM_URL": "http://a, http://b/v1",
    }
    settings = parse_settings(["--port", "3"], environment)
    assert (settings.port, settings.management_port, settings.host) == (3, 2, "h1")
    assert settings.drain_timeout == 90
    assert [backend.url for backend in settings.backends] == ["http://a", "http://b"]


def test_the_defaults_are_those_of_the_documentation() -> None:
    settings = Settings()
    assert (settings.port, settings.management_port) == (3000, 9090)
    assert (settings.shutdown_delay, settings.drain_timeout) == (10, 600)
    timeouts = settings.timeouts
    assert (timeouts.connect, timeouts.first_token, timeouts.idle) == (5, 300, 60)
    assert settings.cors.allow_origins == ("*",)
    assert settings.cors.allow_credentials is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 3000", "prot: unknown setting"),
        ("port: 70000", "port: Input should be less than or equal to 65535 (got 70000)"),
        ("timeouts: {connect: 5}", "timeouts.connect: write a duration such as 10s"),
        ("timeouts: {connect: 0s}", "timeouts.connect: must be longer than 0s"),
        ("limits: {bodyBytes: big}", "limits.bodyBytes"),
        ("backends: [{url: localhost:8000}]", "backends.0.url: write a URL such as http://127.0.0.1:8000"),
        ("backends: [{url: 'http://u:p@a'}]", "backends.0.url: a backend's URL has no user"),
        ("logLevel: loud", "logLevel"),
        ("- a", "the top level must be a mapping"),
        ("a: [", "is not valid YAML"),
        ("a: 2024-13-01", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_setting(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(text)
    with pytest.raises(BadSettings) as caught:
        load(str(file), {})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "x"], "port: "),
        (["--config-file", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["--vllm-url", "ftp://x"], "backends.0.url: write a URL"),
    ],
)
def test_the_command_says_it_in_one_line_and_exits_with_2(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("vllm-gateway: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_models_to_serve_is_one_line(tmp_path: Path) -> None:
    result = run(KUBECONFIG=str(tmp_path / "none"), HOME=str(tmp_path), PORT="0", MANAGEMENT_PORT="0")
    assert result.returncode == 2
    assert "set VLLM_URL" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("--host", "127.0.0.1", "--port", port, "--vllm-url", "http://127.0.0.1:1")
    assert result.returncode == 2
    assert result.stderr == f"vllm-gateway: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_help_shows_what_to_type() -> None:
    result = run("--help")
    assert result.returncode == 0
    for words in ("vllm-gateway --vllm-url http://127.0.0.1:8000", "curl -N", "CONFIG_FILE", "VLLM_API_KEY"):
        assert words in result.stdout
    assert run("--version").stdout == "vllm-gateway 0.1.0\n"


@given(
    st.lists(st.tuples(st.integers(0, 999), st.sampled_from(["h", "m", "s", "ms"])), min_size=1, max_size=4)
)
def test_durations_add_up(parts: list[tuple[int, str]]) -> None:
    seconds = {"h": 3600, "m": 60, "s": 1, "ms": 0.001}
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert parse_duration(text) == pytest.approx(sum(number * seconds[unit] for number, unit in parts))


@pytest.mark.parametrize("text", ["", "5", "5 s", "-5s", "1.5s", "s", "5S", 5, None])
def test_anything_else_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="write a duration"):
        parse_duration(text)
