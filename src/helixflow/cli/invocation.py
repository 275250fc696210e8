"""One run of the command: its global options and the settings they lead to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from helixflow.settings.tree import Settings


@dataclass(slots=True)
class Invocation:
    """The global options, as the callback of the application read them."""

    config: Path | None = None
    data_dir: Path | None = None
    debug: bool = False

    @property
    def config_file(self) -> Path | None:
        """The configuration file in use, if there is one."""
        from helixflow.settings.origins import config_path

        return config_path(self.config)

    def load_settings(self, overrides: Mapping[str, Any] | None = None) -> "Settings":
        """The settings of this run; log lines go to standard error from here on. Raises `UserError` (CONFIG)."""
        # Here and not above: pydantic costs a fifth of a second, which `version` and `--help` need not pay.
        from helixflow.settings.load import load_settings
        from helixflow.telemetry.logs import configure_logging

        configure_logging("debug" if self.debug else "warning", "text", service="cli")
        data_dir = str(self.data_dir) if self.data_dir is not None else None
        return load_settings(self.config, overrides={"data_dir": data_dir, **(overrides or {})})


def invocation_of(context: typer.Context) -> Invocation:
    """The invocation that a command belongs to."""
    found = context.find_object(Invocation)
    assert found is not None
    return found
