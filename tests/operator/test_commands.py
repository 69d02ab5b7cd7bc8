"""The commands that need no cluster, the settings file and the log lines.

Proves: `render` prints exactly what the pure function gives, for files and folders, and nothing when a model
is bad; `validate` names file, model, field and reason, exits 0, 1 or 2; `crd` prints the CRD; a settings
file with a wrong key ends with its name and exit code 2; defaults; log lines are one JSON object each,
clipped, in UTC.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm_models import model_body

from vllm_operator import logs
from vllm_operator.__main__ import main
from vllm_operator.api.crd import crd_manifest
from vllm_operator.api.parsing import parse
from vllm_operator.errors import SettingsError
from vllm_operator.render import render
from vllm_operator.settings import Settings, load_settings, parse_settings

GOOD, BAD = model_body("good"), model_body("bad", replicas="3", gpu={"cont": 1})


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "other"}}
    (tmp_path / "good.yaml").write_text(yaml.safe_dump_all([service, GOOD]))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "bad.yml").write_text(yaml.safe_dump(BAD))
    (tmp_path / "notes.txt").write_text("kind: VLLMModel")
    return tmp_path


def test_render_prints_what_the_pure_function_gives(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("render", str(folder / "good.yaml")) == 0
    printed = capsys.readouterr().out
    assert list(yaml.safe_load_all(printed)) == list(render(parse(GOOD), Settings()))
    assert "&id" not in printed


def test_render_takes_the_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "settings").write_text("images: {cuda: own/vllm:v0.30.0}")
    assert run("render", "--config", str(folder / "settings"), str(folder / "good.yaml")) == 0
    assert "own/vllm:v0.30.0" in capsys.readouterr().out


def test_render_prints_nothing_when_a_model_is_bad(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("render", str(folder)) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "spec.replicas" in printed.err


def test_validate_names_file_model_field_and_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", str(folder)) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{folder}/good.yaml: good: ok\n"
    assert printed.err.splitlines() == [
        f"{folder}/deeper/bad.yml: bad: spec.gpu.cont: is no field; did you mean count?",
        f"{folder}/deeper/bad.yml: bad: spec.replicas: must be an integer, not a string",
    ]


def test_validate_takes_the_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "settings").write_text("policy: {podTemplate: none}")
    asked = model_body("asks", podTemplate={"metadata": {"labels": {"a": "b"}}})
    (folder / "good.yaml").write_text(yaml.safe_dump(asked))
    assert run("validate", str(folder / "good.yaml")) == 0
    assert run("validate", "--config", str(folder / "settings"), str(folder / "good.yaml")) == 1
    assert "good.yaml: asks: spec.podTemplate: is refused by settings.policy" in capsys.readouterr().err


def test_validate_is_content_with_what_is_right(folder: Path) -> None:
    assert run("validate", str(folder / "good.yaml")) == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: [", 1),
        ("made: 2024-13-01", 1),
        ("made: !!int x", 1),
        ("a: &a [*a]", 1),
        ("kind: VLLMModel", 1),
        ("kind: VLLMModel\nmetadata: x", 1),
        ("kind: Pod", 2),
        ("", 2),
        ("3", 2),
    ],
)
def test_validate_on_odd_files(tmp_path: Path, text: str, code: int) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert run("validate", str(tmp_path)) == code


@pytest.mark.parametrize("text", ["logLevel: [", "made: 2024-13-01", "a: &a [*a]", "logLevel: 2024-01-01"])
def test_settings_that_are_no_yaml_are_told_with_their_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"s\.yaml: "):
        load_settings(tmp_path / "s.yaml")


def test_a_date_is_the_text_that_it_was(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("images: {cuda: 2024-01-01}")
    assert load_settings(tmp_path / "s.yaml").images.cuda == "2024-01-01"


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", str(tmp_path / "none.yaml")) == 1
    assert "No such file" in capsys.readouterr().err


def test_wrong_use_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate") == 2
    assert run("render", "--no-such-flag", "x") == 2
    assert "usage" in capsys.readouterr().err


def test_crd_prints_the_crd(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("crd") == 0
    assert yaml.safe_load(capsys.readouterr().out) == crd_manifest()


@pytest.mark.parametrize("command", [["run", "--config"], ["--config"]])
def test_a_wrong_settings_file_ends_the_start(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text("image: {}\nlease: {durationSeconds: 5}")
    assert run(*command, str(tmp_path / "s.yaml")) == 2
    lines = capsys.readouterr().err
    assert "s.yaml: image: is no setting" in lines
    assert "durationSeconds > renewSeconds > retrySeconds must hold" in lines


def test_settings_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFIG_FILE", str(tmp_path / "none.yaml"))
    assert run("run") == 2


def test_no_cluster_to_work_for(tmp_path: Path) -> None:
    env = os.environ | {"KUBECONFIG": str(tmp_path / "none")}
    command = [sys.executable, "-m", "vllm_operator"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.endswith("Run in a pod, or set KUBECONFIG\n")
    assert "Traceback" not in ended.stderr


def test_an_empty_settings_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("")
    assert load_settings(tmp_path / "s.yaml") == Settings() == load_settings(None)
    with pytest.raises(SettingsError, match=r"none\.yaml"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"managementPort": "9090"},
        {"logLevel": "loud"},
        {"watchNamespaces": "ns"},
        [1],
        {"images": {"cuda": ""}},
    ],
)
def test_settings_are_strict(wrong: Any) -> None:
    with pytest.raises(SettingsError):
        parse_settings(wrong, "test")


def log_line(formatter: logging.Formatter, message: str, **facts: Any) -> str:
    record = logging.getLogger("x").makeRecord("x", logging.WARNING, "f", 1, message, (), None, extra=facts)
    record.created = 0.25
    return formatter.format(record)


def test_a_log_line_is_one_json_object() -> None:
    line = log_line(logs.JsonFormatter(), "a\nb", model="ns/m", seconds=1.5, detail="x" * 9999)
    assert "\n" not in line
    found = json.loads(line)
    assert found["time"] == "1970-01-01T00:00:00.250Z"
    assert (found["level"], found["event"], found["model"], found["seconds"]) == (
        "warning",
        "a\nb",
        "ns/m",
        1.5,
    )
    assert len(found["detail"]) == logs.MAX_VALUE


def test_a_traceback_stays_in_its_line() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("no")
    info = (caught.type, caught.value, caught.tb)
    record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed", (), info)
    assert "ValueError: invalid literal" in json.loads(logs.JsonFormatter().format(record))["traceback"]


def test_text_lines_are_for_people() -> None:
    assert log_line(logs.TextFormatter(), "created", model="ns/m").endswith("warning created model=ns/m")
