"""`helixflow doctor`: looks at the machine and the installation, and says what to do."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from helixflow.cli.invocation import Invocation, invocation_of
from helixflow.cli.output import print_json, printable
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from helixflow.cli.findings import Finding

EPILOG = """Example:

$ helixflow doctor

$ helixflow doctor --json"""

_COLOURS = {"ok": "32", "warning": "33", "problem": "31"}


def doctor_command(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check Python, CPU, memory, GPU, ports, disk, model files and running services; exit code 1 for a problem."""
    findings = []
    for finding in _examine(invocation_of(context)):
        findings.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        print_json({"ok": not _problems(findings), "checks": [asdict(finding) for finding in findings]})
    if _problems(findings):
        raise typer.Exit(ExitCode.FAILURE.value)


def _examine(invocation: Invocation) -> "Iterator[Finding]":
    from helixflow.cli import installation, machine
    from helixflow.cli.findings import Finding

    yield machine.check_python()
    yield machine.check_cpu()
    yield machine.check_gpu()
    yield installation.check_engine()
    try:
        settings = invocation.load_settings()
        planned = installation.plan(settings)
    except UserError as exc:
        yield Finding("configuration", "problem", exc.message, "Correct it; helixflow config check looks again.")
        return
    yield Finding("configuration", "ok", f"{len(settings.models)} models configured")
    running = installation.check_services(settings)
    checks: list[Callable[[], list[Finding]]] = [
        lambda: [machine.check_memory(planned, running=running.status == "ok" and running.running)],
        lambda: [installation.check_port(settings, running=running.running)],
        lambda: [installation.check_data_dir(settings, planned)],
        lambda: installation.check_models(settings, planned),
    ]
    yield running
    for check in checks:
        yield from check()


def _problems(findings: "list[Finding]") -> bool:
    return any(finding.status == "problem" for finding in findings)


def _show(finding: "Finding") -> None:
    status = finding.status.ljust(8)
    if sys.stdout.isatty():
        status = f"\033[{_COLOURS[finding.status]}m{status}\033[0m"
    lines = printable(finding.message).splitlines()
    sys.stdout.write(f"{status} {finding.name}: {lines[0]}\n")
    for line in (*lines[1:], *([f"→ {finding.advice}"] if finding.advice else [])):
        sys.stdout.write(f"         {line}\n")
    sys.stdout.flush()
