"""`vllm-gateway`: reads flags, environment and file, and serves."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from vllm_gateway import __version__
from vllm_gateway.settings import BadSettings, Settings, load, split_urls

_EPILOG = """\
Models come from Kubernetes (in a pod, or by your kubeconfig) unless --vllm-url or `backends:` in the file
names static backends, whose models are asked from their /v1/models.

examples:
  vllm-gateway --vllm-url http://127.0.0.1:8000
  VLLM_URL=http://gpu-1:8000,http://gpu-2:8000 PORT=8080 vllm-gateway
  curl -N localhost:3000/chat/stream -H 'content-type: application/json' -d '{"message": "Hello"}'

A flag beats its environment variable, which beats the file. VLLM_API_KEY, if set, goes to static backends.
"""

# Flag, environment variable, key of the file, help.
_OPTIONS = (
    ("--vllm-url", "VLLM_URL", "backends", "static backends: one URL, or several with commas"),
    ("--host", "HOST", "host", "address to listen on (default 0.0.0.0)"),
    ("--port", "PORT", "port", "port of the API (default 3000)"),
    (
        "--management-port",
        "MANAGEMENT_PORT",
        "managementPort",
        "/metrics /livez /readyz /load (default 9090)",
    ),
    ("--workers", "WORKERS", "workers", "processes that share the port, on a single machine (default 1)"),
    ("--log-level", "LOG_LEVEL", "logLevel", "debug, info, warning or error (default info)"),
    ("--log-format", "LOG_FORMAT", "logFormat", "json or text (default: text on a terminal, else json)"),
)


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings in force. Raises BadSettings."""
    options = vars(_parser().parse_args(arguments))
    overrides: dict[str, object] = {}
    if sys.stdout.isatty():
        overrides["logFormat"] = "text"
    for flag, variable, key, _ in _OPTIONS:
        given = options[flag.removeprefix("--").replace("-", "_")]
        value = environment.get(variable) if given is None else given
        if value:
            overrides[key] = split_urls(value) if key == "backends" else value
    return load(options["config_file"] or environment.get("CONFIG_FILE"), overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-gateway",
        description="Streams chat from vLLM: /chat, /chat/stream and the OpenAI-compatible /v1.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vllm-gateway {__version__}")
    parser.add_argument("--config-file", metavar="FILE", help="YAML file with every setting [CONFIG_FILE]")
    for flag, variable, _, text in _OPTIONS:
        parser.add_argument(flag, metavar=variable.rsplit("_", 1)[-1], help=f"{text} [{variable}]")
    return parser


def main() -> None:
    try:
        settings = parse_settings(sys.argv[1:], os.environ)
        # After the arguments: --help should not wait for the imports.
        from vllm_gateway.app import run
        from vllm_gateway.telemetry import configure_logging

        configure_logging(settings.log_level, as_json=settings.log_format == "json")
        if settings.workers > 1:
            from vllm_gateway.workers import run_workers

            sys.exit(run_workers(settings))
        run(settings)
    except (BadSettings, OSError) as error:
        print(f"vllm-gateway: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before there is anything to drain
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
