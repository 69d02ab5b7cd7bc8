"""Structured logs: one event a line, JSON for machines or text for people.

No bodies, and what looks like a credential is taken out, whoever's words it stood in.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Literal

from vllm_operator.errors import clip
from vllm_operator.observe.engine_log import scrub

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
MAX_VALUE = 2048


def _facts(record: logging.LogRecord) -> dict[str, object]:
    """What was passed as `extra`."""
    found = {
        key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")
    }
    return {
        key: value if isinstance(value, int | float) else clip(scrub(str(value)), MAX_VALUE)
        for key, value in found.items()
    }


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": clip(scrub(record.getMessage()), MAX_VALUE),
            "logger": record.name,
            **_facts(record),
        }
        if record.exc_info:
            line["traceback"] = scrub(self.formatException(record.exc_info))
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{key}={value}" for key, value in _facts(record).items())
        parts = (
            self.formatTime(record, "%H:%M:%S"),
            f"{record.levelname.lower():7}",
            scrub(record.getMessage()),
            facts,
        )
        line = " ".join(parts)
        return (
            f"{line.rstrip()}\n{scrub(self.formatException(record.exc_info))}"
            if record.exc_info
            else line.rstrip()
        )


def set_up(level: str, style: Literal["json", "text"]) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
