"""A configuration file as the admin API takes it, and its answer as people read it."""

import re
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from helixflow.cli.administration import administer
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError

if TYPE_CHECKING:
    from helixflow.cli.admin_api import AdminApi

T = TypeVar("T")
_SIGNS = {"added": "+", "removed": "-", "changed": "~"}
_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class ModelsFile:
    """The models that a file names; its other sections are not taken."""

    path: Path
    text: str
    models: list[dict[str, Any]]
    others: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "ModelsFile":
        """Raises `UserError` (CONFIG)."""
        try:
            text = path.expanduser().read_text(encoding="utf-8")
            tree = tomllib.loads(text)
        except OSError as exc:
            raise UserError(f"{path}: cannot be read: {exc.strerror}", ExitCode.CONFIG) from exc
        except UnicodeDecodeError as exc:
            raise UserError(f"{path}: is not UTF-8 text", ExitCode.CONFIG) from exc
        except tomllib.TOMLDecodeError as exc:
            raise UserError(f"{path}: not valid TOML: {exc}", ExitCode.CONFIG) from exc
        models = tree.pop("models", None)
        if not isinstance(models, list):
            raise UserError(f"{path}: names no models; write [[models]] and name = …", ExitCode.CONFIG)
        return cls(path, text, models, tuple(tree))

    def submit(self, context: typer.Context, question: "Callable[[AdminApi], Awaitable[T]]") -> T:
        """As `administer`. What the server finds wrong is said with the line of the file: `UserError` (CONFIG)."""
        try:
            return administer(context, question)
        except HelixError as exc:
            if exc.kind is not ErrorKind.UNPROCESSABLE or not (exc.param or "").startswith("models"):
                raise
            from helixflow.settings.lines import line_of

            line = line_of(self.text, _location(exc.param or ""))
            where = f"{self.path}:{line}" if line else str(self.path)
            raise UserError(f"{where}: {exc.param}: {exc.message}", ExitCode.CONFIG) from exc


def describe_plan(plan: dict[str, Any]) -> Iterator[str]:
    """One line for each model and deployment that comes, goes or changes, and one for each setting of it."""
    for change in plan["changes"]:
        noun = "model" if change["deployment"] is None else "deployment"
        line = f"{_SIGNS[change['kind']]} {noun} {change['deployment'] or change['model']}"
        if change["requests"]:
            line += (
                f"  ({_requests(change['requests'])} in 24 hours{'; would be refused' if change['unserved'] else ''})"
            )
        yield line
        for field in change["fields"]:
            yield f"    {field['name']}: {_shown(field['before'])} → {_shown(field['after'])}"
    if not plan["changes"]:
        yield f"nothing would change; version {plan['version']} is in force"


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'}"


def _shown(value: str | None) -> str:
    return "(none)" if value in (None, "null") else str(value)


def _location(path: str) -> tuple[str | int, ...]:
    """`models[1].name` as the parts of it."""
    return tuple(name or int(number) for name, number in _PART.findall(path))
