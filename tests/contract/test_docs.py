"""The documents and the code say the same.

Proves: docs/troubleshooting.md has one entry for each reason that a condition can have, and no other;
docs/policy.md names every option that the policy refuses, and no other as refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from vllm_operator.api.status import Reason
from vllm_operator.render.engine_options import CODE_KEYS, CUSTOM_DRAFTER, ENV_EFFECTS, FLAG_EFFECTS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_troubleshooting_has_an_entry_for_each_reason() -> None:
    headings = re.findall(r"^## (\w+)$", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert sorted(headings) == sorted(Reason)


def test_the_policy_page_names_what_is_refused() -> None:
    rows = [line for line in (DOCS / "policy.md").read_text().splitlines() if line.startswith("| ")]
    named = {word.lstrip("…") for row in rows for word in re.findall(r"`([^`]+)`", row)}
    assert named == {*FLAG_EFFECTS, *ENV_EFFECTS, *CODE_KEYS, f"--spec-method {CUSTOM_DRAFTER}"}
