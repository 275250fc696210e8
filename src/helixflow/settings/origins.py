"""Where settings come from: file and line, or environment variable. What is in neither has its default."""

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from helixflow.settings.lines import line_of
from helixflow.settings.load import ENV_PREFIX, NOT_SETTINGS, decode_variable

Location = tuple[str | int, ...]


def config_path(config: Path | None, environ: Mapping[str, str] | None = None) -> Path | None:
    """The configuration file in use: the given one, or `$HELIXFLOW_CONFIG`, or none."""
    environ = os.environ if environ is None else environ
    if config is None and environ.get("HELIXFLOW_CONFIG"):
        return Path(environ["HELIXFLOW_CONFIG"])
    return config


def read_origins(config: Path | None, environ: Mapping[str, str] | None = None) -> dict[Location, str]:
    """The origin of every setting that is not a default. Call after `load_settings` has accepted the same input."""
    environ = os.environ if environ is None else environ
    found: dict[Location, str] = {}
    path = config_path(config, environ)
    if path is not None:
        text = path.expanduser().read_text(encoding="utf-8")
        for location in _leaves(tomllib.loads(text), ()):
            line = line_of(text, location)
            found[location] = f"{path}:{line}" if line else str(path)
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in NOT_SETTINGS:
            below = tuple(name.lower() for name in variable.removeprefix(ENV_PREFIX).split("__"))
            # A whole list or table replaces the file's.
            found = {location: origin for location, origin in found.items() if location[: len(below)] != below}
            found.update(dict.fromkeys(_leaves(decode_variable(variable, environ[variable]), below), variable))
    return found


def _leaves(value: Any, location: Location) -> Iterator[Location]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _leaves(child, (*location, name))
    elif isinstance(value, list) and value and all(isinstance(child, dict) for child in value):
        for index, child in enumerate(value):
            yield from _leaves(child, (*location, index))
    else:
        yield location
