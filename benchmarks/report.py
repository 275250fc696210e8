"""What a bar found, and how it is shown and kept."""

import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Options:
    """How thorough a run is. `rounds` turns of `window_s` seconds each, after `warm_up_s`."""

    quick: bool
    rounds: int
    window_s: float
    warm_up_s: float = 0.7

    @classmethod
    def of(cls, *, quick: bool) -> "Options":
        return cls(quick, 3, 1.5) if quick else cls(quick, 5, 4.0)


@dataclass(frozen=True, slots=True)
class Result:
    """One figure. With `limit` it is a bar: `value` must be at most (or, `at_least`, at least) that."""

    bar: str
    metric: str
    value: float
    unit: str
    limit: float | None = None
    at_least: bool = False
    detail: str = ""

    @property
    def verdict(self) -> Literal["met", "missed", ""]:
        if self.limit is None:
            return ""
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "met" if met else "missed"


def spread(values: list[float]) -> str:
    """How far the rounds lie apart."""
    return f"{number(min(values))} to {number(max(values))} over {len(values)}"


def number(value: float) -> str:
    """Three or four significant digits, never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def median(values: list[float]) -> float:
    return statistics.median(values)


def show(results: list[Result], console: Console) -> None:
    table = Table(title="HelixFlow benchmarks", title_justify="left")
    for column in ("bar", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for result in results:
        limit = "" if result.limit is None else f"{'≥' if result.at_least else '≤'} {result.limit:g}"
        colour = {"met": "green", "missed": "red", "": ""}[result.verdict]
        verdict = f"[{colour}]{result.verdict}[/]" if colour else ""
        table.add_row(result.bar, result.metric, f"{number(result.value)} {result.unit}", limit, verdict, result.detail)
    console.print(table)


def save(results: list[Result], options: Options) -> Path:
    """Writes the results as JSON; gives the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    document = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "options": asdict(options),
        "machine": {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()},
        "commit": _commit(),
        "results": [{**asdict(result), "verdict": result.verdict} for result in results],
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def _commit() -> str:
    try:
        run = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, cwd=RESULTS.parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip()
