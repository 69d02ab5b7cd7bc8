"""Links in the documents lead somewhere.

Proves: every relative link of every Markdown file names a file that is in the repository, and its fragment a
heading of that file; a broken one is noticed. Links to other sites are not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = re.compile(r"(^|/)(\.(?!github)|node_modules/)")  # made here, and in no clone
FILES = sorted(path for path in ROOT.rglob("*.md") if not SKIPPED.search(path.relative_to(ROOT).as_posix()))


def links(text: str) -> Iterator[str]:
    """Of Markdown outside of code: `[words](target)`."""
    plain = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(text: str) -> set[str]:
    """As GitHub makes them: https://docs.github.com/en/get-started/writing-on-github (section links)."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(file: Path, text: str) -> Iterator[str]:
    for link in links(text):
        path, _, fragment = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists():
            yield f"{link}: no such file"
        elif fragment and fragment not in anchors(text if target == file else target.read_text()):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    assert list(broken(file, file.read_text())) == []


def test_a_broken_link_is_noticed() -> None:
    text = "# A heading, `code`\n[a](docs) [b](docs/none.md) [c](#a-heading-code) [d](#b) `[e](none)`"
    assert list(broken(ROOT / "README.md", text)) == ["docs/none.md: no such file", "#b: no such heading"]
