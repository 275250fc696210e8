"""Questions to the person at the terminal. Programs answer them with lines of standard input, in the same order."""

import sys
from typing import Final

import typer

from helixflow.core.errors import ExitCode, UserError

_MAX_LINE: Final = 64 * 1024


def is_interactive() -> bool:
    """Whether somebody is there to be asked."""
    return sys.stdin.isatty()


def ask_line(question: str, *, optional: bool = False) -> str:
    """One line, without spaces around it; empty where `optional`. Raises `UserError` (USAGE) when there is none."""
    if not is_interactive():
        return _read_line(question).strip()
    default = "" if optional else None
    return str(typer.prompt(question, default=default, show_default=False, err=True)).strip()


def ask_secret(question: str) -> str:
    """One line that is not shown while it is typed. Raises `UserError` (USAGE) when there is none."""
    return str(typer.prompt(question, hide_input=True, err=True)) if is_interactive() else _read_line(question)


def ask_new_password(question: str) -> str:
    """Twice from a person, until both are the same; once from a program, which does not mistype it."""
    if not is_interactive():
        return _read_line(question)
    return str(typer.prompt(question, hide_input=True, confirmation_prompt="Once more", err=True))


def ask_whether(question: str) -> bool:
    """Yes or no; no from programs, which have an option for it."""
    return is_interactive() and bool(typer.confirm(question, err=True))


def _read_line(question: str) -> str:
    try:
        line = sys.stdin.readline(_MAX_LINE)
    except UnicodeDecodeError as exc:
        raise UserError(f"{question}: standard input is not UTF-8 text", ExitCode.USAGE) from exc
    if not line:
        raise UserError(f"{question}: standard input has ended", ExitCode.USAGE)
    return line.removesuffix("\n").removesuffix("\r")
