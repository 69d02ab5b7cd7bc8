"""Prints the flags of `vllm serve`, as its own parser has them, for the tests of what the operator renders.

Run in the image, which has no need of this file:
  docker run --rm -i --entrypoint python3 vllm-fleet/vllm-cpu:0.32.0 - \
    < k8s/local/vllm-cpu/dump_flags.py > tests/golden/vllm-0.32.0-flags.json

One entry a spelling: {"--flag": {"type", "choices", "default", "nargs", "action"}}. `type` names the function
that reads a value, null for flags without one; `action` is argparse's class; a default that JSON cannot say
is the name of its type.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

PLAIN = (bool, int, float, str, type(None))


def plain(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return type(value).__name__


def describe(action: argparse.Action) -> dict[str, Any]:
    return {
        "type": getattr(action.type, "__name__", None if action.type is None else str(action.type)),
        "choices": None if action.choices is None else [plain(choice) for choice in action.choices],
        "default": plain(action.default),
        "nargs": action.nargs,
        "action": type(action).__name__,
    }


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs while it is imported
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    actions = parser._actions  # noqa: SLF001 (argparse has no public way to list them)
    flags = {flag: describe(action) for action in actions for flag in action.option_strings}
    print(json.dumps(dict(sorted(flags.items())), indent=1))


if __name__ == "__main__":
    main()
