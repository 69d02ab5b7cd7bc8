"""`render`, `validate` and `crd`: what needs no cluster. Exit codes: 0 fine, 1 invalid, 2 wrong use."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vllm_operator import names
from vllm_operator.api.crd import crd_manifest
from vllm_operator.api.parsing import parse
from vllm_operator.errors import SpecError
from vllm_operator.render import render
from vllm_operator.settings import UNREADABLE, Settings, json_like

INVALID, WRONG_USE = 1, 2


class _Dumper(yaml.SafeDumper):
    """Without anchors: what is equal is written twice, as kubectl does."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def to_yaml(documents: Iterable[dict[str, Any]]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


@dataclass(frozen=True)
class Document:
    """One VLLMModel in a file, or why the file has none (`error`)."""

    path: Path
    body: dict[str, Any]
    error: str = ""

    @property
    def label(self) -> str:
        metadata = self.body.get("metadata")
        return f"{self.path}: {metadata.get('name', '?') if isinstance(metadata, dict) else '?'}"


def documents(paths: Iterable[Path]) -> Iterator[Document]:
    """The VLLMModels of files and folders (*.yaml, *.yml, *.json); other kinds are passed over."""
    for path in paths:
        files = sorted(item for item in path.rglob("*") if item.suffix in (".yaml", ".yml", ".json"))
        for file in files if path.is_dir() else [path]:
            yield from _in_file(file)


def _in_file(file: Path) -> Iterator[Document]:
    try:
        loaded = [json_like(body) for body in yaml.safe_load_all(file.read_text())]
    except UNREADABLE as error:
        yield Document(file, {}, " ".join(str(error).split()))
        return
    for body in loaded:
        if isinstance(body, dict) and body.get("kind") == names.KIND:
            yield Document(file, body)


def _rendered(document: Document, settings: Settings) -> tuple[dict[str, Any], ...]:
    return render(parse(document.body, settings.profiles), settings)


def complaints(document: Document, settings: Settings) -> Iterator[str]:
    """`file: name: field: reason` for each problem."""
    if document.error:
        yield f"{document.path}: {document.error}"
        return
    try:
        _rendered(document, settings)
    except SpecError as error:
        yield from (f"{document.label}: {problem}" for problem in error.problems)


def run_validate(paths: list[Path], settings: Settings) -> int:
    found = list(documents(paths))
    if not found:
        return _fail([f"no {names.KIND} found"], WRONG_USE)
    bad = 0
    for document in found:
        lines = list(complaints(document, settings))
        bad += bool(lines)
        if lines:
            _fail(lines, INVALID)
        else:
            sys.stdout.write(f"{document.label}: ok\n")
    return INVALID if bad else 0


def run_render(paths: list[Path], settings: Settings) -> int:
    """Prints what would be applied where nothing is known of the cluster; nothing if a model is bad."""
    found = list(documents(paths))
    if not found:
        return _fail([f"no {names.KIND} found"], WRONG_USE)
    if lines := [line for document in found for line in complaints(document, settings)]:
        return _fail(lines, INVALID)
    sys.stdout.write(to_yaml(body for document in found for body in _rendered(document, settings)))
    return 0


def run_crd() -> int:
    sys.stdout.write(to_yaml([crd_manifest()]))
    return 0


def _fail(lines: list[str], code: int) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return code
