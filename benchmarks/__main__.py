"""`python -m benchmarks [--quick] [names…]`: runs the bars, shows a table, writes JSON; 1 when one is missed."""

import argparse
import importlib
import sys

from rich.console import Console

from benchmarks.processes import LOAD_CORE, pin
from benchmarks.report import Options, Result, save, show

BARS = (
    "nonstream_cpu",
    "stream_cpu",
    "paced_streams",
    "added_latency",
    "memory",
    "nginx",
    "startup",
    "engine_efficiency",
    "fairness",
    "key_resolution",
    "identification",
    "administration",
    "redis_limits",
    "ledger",
    "journal",
    "metering",
    "router_decision",
    "prefix_affinity",
    "many_pools",
    "slot_freed",
)
# These use all cores as a user's machine would; the others are pinned.
_UNPINNED = frozenset({"startup", "engine_efficiency", "fairness", "key_resolution", "prefix_affinity", "slot_freed"})


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: a smoke test, not a result")
    parser.add_argument("names", nargs="*", metavar="name", help=f"which bars to run (default: all): {', '.join(BARS)}")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BARS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(BARS)}")
    options = Options.of(quick=arguments.quick)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    results: list[Result] = []
    failed = False
    # Bars that use the whole machine come first: later ones bind this process and with it all it starts.
    for name in sorted(arguments.names or BARS, key=lambda name: (name not in _UNPINNED, BARS.index(name))):
        if name not in _UNPINNED:
            pin(LOAD_CORE)
        console.print(f"[dim]{name} …[/]")
        try:
            results += importlib.import_module(f"benchmarks.bars.{name}").run(options)
        except (RuntimeError, OSError) as exc:  # the other bars' figures must not be lost
            failed = True
            console.print(f"[red]{name} failed:[/] {exc}", highlight=False)
            results.append(Result(name, "failed", 0, "", detail=str(exc)[:300]))
    show(results, console)
    console.print(f"[dim]{save(results, options)}[/]")
    return 1 if failed or any(result.verdict == "missed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
