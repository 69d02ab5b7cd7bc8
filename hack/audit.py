"""Asks pip-audit whether a pinned dependency of the images has a known vulnerability.

    python hack/audit.py [REQUIREMENTS…]      (default: both images')

Ends with 1 for a vulnerability, and with 2 where a package could not be looked up: without the database (a
mirror that has no such service, no network) nothing has been shown, and that is no success.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = ("requirements/gateway.txt", "requirements/operator.txt")
FLAGS = ("--disable-pip", "--require-hashes", "--progress-spinner=off", "--format=json")
SHOWN = 5


def report(command: Sequence[str], file: Path) -> Mapping[str, Any]:
    """pip-audit's own report. Raises OSError where it ends without one."""
    done = subprocess.run([*command, "-r", str(file)], check=False, capture_output=True, text=True)
    try:
        return dict(json.loads(done.stdout))
    except ValueError as error:
        words = done.stderr.strip().splitlines() or ["it said nothing"]
        raise OSError(f"pip-audit gave no report: {words[-1]}") from error


def vulnerabilities(found: Mapping[str, Any]) -> Iterator[str]:
    for package in found["dependencies"]:
        for flaw in package.get("vulns", ()):
            fixed = ", ".join(flaw["fix_versions"]) or "no version"
            yield f"{package['name']} {package['version']}: {flaw['id']}, fixed in {fixed}"


def not_looked_up(found: Mapping[str, Any]) -> list[str]:
    return [package["name"] for package in found["dependencies"] if "skip_reason" in package]


def audit(command: Sequence[str], file: Path) -> int:
    """Prints what was found; the exit code."""
    found = report(command, file)
    flaws, missing = list(vulnerabilities(found)), not_looked_up(found)
    for flaw in flaws:
        print(f"{file.name}: {flaw}")
    if missing:
        names = ", ".join(missing[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
        print(f"{file.name}: {len(missing)} packages could not be looked up: {names}")
    if not flaws and not missing:
        print(f"{file.name}: {len(found['dependencies'])} packages, no known vulnerability")
    return 1 if flaws else 2 if missing else 0


def main(arguments: Sequence[str], pip_audit: Sequence[str] = ("pip-audit",)) -> int:
    command = [*pip_audit, *FLAGS]
    try:
        codes = [audit(command, ROOT / file) for file in arguments or FILES]
    except OSError as error:
        print(f"audit: {error}", file=sys.stderr)
        return 2
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    beside = Path(sys.executable).with_name("pip-audit")
    sys.exit(main(sys.argv[1:], [str(beside)]))
