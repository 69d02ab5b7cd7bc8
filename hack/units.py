"""Values in the units that the dashboards use, as short as Grafana writes them."""

from __future__ import annotations

import math

SUFFIXES = {"reqps": " req/s"}
LARGE = ((1e9, " Bil"), (1e6, " Mil"), (1e3, " K"))
TIMES = ((3600.0, " h"), (60.0, " min"), (1.0, " s"), (1e-3, " ms"), (1e-6, " µs"))


def readable(value: float, unit: str = "short", decimals: int | None = None) -> str:
    """`unit` is Grafana's id: short, s, percentunit or reqps. Raises ValueError for another one."""
    if unit == "percentunit":
        return f"{plain(value * 100, decimals)}%"
    if unit == "s":
        factor, name = next((pair for pair in TIMES if abs(value) >= pair[0]), (1.0, " s"))
        return f"{plain(value / factor, decimals)}{name}"
    if unit != "short" and unit not in SUFFIXES:
        raise ValueError(f"unit {unit!r} is not known here")
    factor, name = next((pair for pair in LARGE if abs(value) >= pair[0]), (1.0, ""))
    return f"{plain(value / factor, decimals)}{name}{SUFFIXES.get(unit, '')}"


def plain(value: float, decimals: int | None = None) -> str:
    """With as many decimals as asked for; else three significant digits, and no zeros behind them."""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value == 0:
        return "0"
    shown = max(0, 2 - math.floor(math.log10(abs(value))))
    written = f"{value:.{shown}f}"
    return written.rstrip("0").rstrip(".") if "." in written else written


def ticks(top: float, count: int = 5) -> list[float]:
    """Round values from 0 to at least `top`, about `count` of them."""
    rough = top / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [step * index for index in range(math.ceil(top / step - 1e-9) + 1)]
