"""The command `vllm-operator`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_operator import __version__, logs
from vllm_operator.errors import SettingsError
from vllm_operator.offline import WRONG_USE, run_crd, run_render, run_validate
from vllm_operator.settings import Settings, load_settings


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(_with_default_command(list(sys.argv[1:] if argv is None else argv)))
    try:
        sys.exit(_run(options))
    except SettingsError as error:
        print(error, file=sys.stderr)
        sys.exit(WRONG_USE)


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "crd":
            return run_crd()
        case "validate":
            return run_validate(options.paths, _settings(options))
        case "render":
            return run_render(options.paths, _settings(options))
        case _:
            return _serve(_settings(options))


def _serve(settings: Settings) -> int:
    from vllm_operator.app import (
        run_operator,
    )  # kopf and the client take a second that the others need not wait
    from vllm_operator.handlers import quieten_kopf

    logs.set_up(settings.log_level, settings.log_format)
    quieten_kopf()
    asyncio.run(run_operator(settings))
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    named = options.config or os.environ.get("CONFIG_FILE")
    return load_settings(Path(named) if named else None)


def _with_default_command(argv: list[str]) -> list[str]:
    """`vllm-operator --config FILE` is `vllm-operator run --config FILE`."""
    known = {"run", "render", "validate", "crd", "-h", "--help", "--version"}
    return argv if argv and argv[0] in known else ["run", *argv]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-operator", description="Runs VLLMModels on Kubernetes.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the operator (the default)")
    render = commands.add_parser(
        "render", help="print what would be applied for VLLMModels in files, offline"
    )
    validate = commands.add_parser(
        "validate", help="check VLLMModels in files; exit code 1 if one is invalid"
    )
    commands.add_parser("crd", help="print the CustomResourceDefinition")
    for command in (run, render, validate):
        command.add_argument(
            "--config", metavar="FILE", help="settings (default: $CONFIG_FILE, or the chart's)"
        )
    for command in (render, validate):
        command.add_argument("paths", metavar="FILE|DIR", nargs="+", type=Path)
    return parser


if __name__ == "__main__":
    main()
