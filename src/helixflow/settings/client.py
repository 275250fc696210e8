"""What the environment says to commands that talk to a server: where it is and with which key."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ClientEnvironment:
    """`HELIXFLOW_BASE_URL`, `HELIXFLOW_API_KEY`, `OPENAI_API_KEY` and `HELIXFLOW_BOOTSTRAP_API_KEY`; None when unset
    or empty. `config_home` is where a user's own files are kept: `XDG_CONFIG_HOME`, by default `~/.config`, with the
    tilde.
    """

    base_url: str | None
    api_key: str | None
    openai_api_key: str | None
    bootstrap_api_key: str | None
    config_home: Path = Path("~/.config")


def client_environment(environ: Mapping[str, str] | None = None) -> ClientEnvironment:
    environ = os.environ if environ is None else environ

    def read(name: str) -> str | None:
        return environ.get(name, "").strip() or None

    return ClientEnvironment(
        base_url=read("HELIXFLOW_BASE_URL"),
        api_key=read("HELIXFLOW_API_KEY"),
        openai_api_key=read("OPENAI_API_KEY"),
        bootstrap_api_key=read("HELIXFLOW_BOOTSTRAP_API_KEY"),
        config_home=Path(read("XDG_CONFIG_HOME") or "~/.config"),
    )
