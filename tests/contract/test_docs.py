"""The documents and the code say the same.

Proves: docs/troubleshooting.md has one entry for each reason that a condition can have, and no other.
"""

from __future__ import annotations

import re
from pathlib import Path

from vllm_operator.api.status import Reason

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_troubleshooting_has_an_entry_for_each_reason() -> None:
    headings = re.findall(r"^## (\w+)$", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert sorted(headings) == sorted(Reason)
