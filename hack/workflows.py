"""Runs actionlint over .github/workflows, built from its Go module as go.sum pins it.

Go is the machine's, or the one that the cluster driver fetches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = Path(__file__).with_name("actionlint")


def main() -> int:
    sys.path.append(str(ROOT / "k8s" / "local" / "driver"))
    import golang

    go = golang.find_go(golang.go_version((MODULE / "go.mod").read_text()))
    files = sorted(map(str, (ROOT / ".github" / "workflows").glob("*.yaml")))
    command = [go, "tool", "actionlint", "-no-color", *files]
    done = subprocess.run(command, cwd=MODULE, env=os.environ | golang.environment(), check=False)
    if done.returncode == 0:
        print(f"actionlint: {len(files)} workflows")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
