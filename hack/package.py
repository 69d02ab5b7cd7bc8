"""Packs both charts into dist/, as `helm package` does."""

from __future__ import annotations

import helm

DIST = helm.ROOT / "dist"


def main() -> None:
    DIST.mkdir(exist_ok=True)
    for chart in (helm.CHART, helm.MODELS_CHART):
        print(helm.package(chart, DIST).relative_to(helm.ROOT))


if __name__ == "__main__":
    main()
