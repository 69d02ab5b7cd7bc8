"""Runs actionlint over .github/workflows, built once from its Go module as go.sum pins it.

Go is the machine's, or the one that the cluster driver fetches.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = "github.com/rhysd/actionlint"


def main() -> int:
    sys.path.append(str(ROOT / "k8s" / "local" / "driver"))
    import golang

    actionlint = golang.Program("actionlint", MODULE, 20, f"{MODULE}/cmd/actionlint")
    golang.ensure([actionlint])
    files = sorted(map(str, (ROOT / ".github" / "workflows").glob("*.yaml")))
    done = subprocess.run([actionlint.path(), "-no-color", *files], check=False)
    if done.returncode == 0:
        print(f"actionlint {actionlint.version()}: {len(files)} workflows")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
