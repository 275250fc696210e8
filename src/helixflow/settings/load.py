"""Reading settings: TOML < environment < flags, with errors that name file, line and key."""

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.lines import line_of
from helixflow.settings.problems import Problem, problems_of
from helixflow.settings.tree import Settings

ENV_PREFIX = "HELIXFLOW_"
NOT_SETTINGS = frozenset({"HELIXFLOW_CONFIG", "HELIXFLOW_BOOTSTRAP_API_KEY", "HELIXFLOW_API_KEY", "HELIXFLOW_BASE_URL"})


def load_settings(
    config: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings tree from a file (given, or `$HELIXFLOW_CONFIG`, or none), the environment and flags.

    Environment variables are `HELIXFLOW_` plus the path with `__` between its parts; a value that begins with `[` or
    `{` is JSON. `overrides` is keyed by dotted path. Raises `UserError` (exit code CONFIG) with one line a problem.
    """
    environ = os.environ if environ is None else environ
    if config is None and environ.get("HELIXFLOW_CONFIG"):
        config = Path(environ["HELIXFLOW_CONFIG"])
    text = _read(config) if config is not None else ""
    tree = _parse(text, config)
    origins: dict[tuple[str, ...], str] = {}
    for variable, value in sorted(environ.items()):
        if variable.startswith(ENV_PREFIX) and variable not in NOT_SETTINGS:
            path = tuple(part.lower() for part in variable.removeprefix(ENV_PREFIX).split("__"))
            _put(tree, path, decode_variable(variable, value), f"environment variable {variable}")
            origins[path] = f"environment variable {variable}"
    for dotted, value in (overrides or {}).items():
        if value is not None:
            path = tuple(dotted.split("."))
            _put(tree, path, value, f"flag for {dotted}")
            origins[path] = f"flag for {dotted}"
    try:
        return Settings.model_validate(tree)
    except ValidationError as exc:
        problems = [_describe(problem, text, config, origins) for problem in problems_of(exc)]
        raise UserError("\n".join(problems), ExitCode.CONFIG) from exc


def _read(config: Path) -> str:
    try:
        return config.expanduser().read_text(encoding="utf-8")
    except OSError as exc:
        raise UserError(f"{config}: cannot be read: {exc.strerror}", ExitCode.CONFIG) from exc
    except UnicodeDecodeError as exc:
        raise UserError(f"{config}: is not UTF-8 text", ExitCode.CONFIG) from exc


def _parse(text: str, config: Path | None) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise UserError(f"{config}: not valid TOML: {exc}", ExitCode.CONFIG) from exc


def decode_variable(variable: str, value: str) -> Any:
    """Lists and tables are JSON; anything else is text, which the tree makes a number or a path of.

    Raises `UserError` (CONFIG) that names the variable.
    """
    if not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError as exc:
        raise UserError(f"environment variable {variable}: not valid JSON: {exc}", ExitCode.CONFIG) from exc


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any, origin: str) -> None:
    node = tree
    for part in path[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(f"{origin}: {part!r} cannot be set this way", ExitCode.CONFIG)
        node = child
    node[path[-1]] = value


def _describe(problem: Problem, text: str, config: Path | None, origins: dict[tuple[str, ...], str]) -> str:
    names = tuple(str(part) for part in problem.location)
    origin = next((origins[names[:i]] for i in range(len(names), 0, -1) if names[:i] in origins), None)
    if origin is None and config is not None:
        line = line_of(text, problem.location)
        origin = f"{config}:{line}" if line else str(config)
    return f"{origin}: {problem}" if origin else str(problem)
