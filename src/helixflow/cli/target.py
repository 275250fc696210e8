"""Which server a command talks to, with which key, and which of its models."""

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from helixflow.cli.api import ApiClient
from helixflow.cli.served import looks_like_embeddings
from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.client import ClientEnvironment

if TYPE_CHECKING:
    from helixflow.settings.tree import Settings

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class Target:
    """A base URL and the key for it, None when there is none. `ours` is true for the configured gateway.

    `spare_key` is the first key of this installation, for a server on this machine that turns out to be HelixFlow.
    """

    base_url: str
    api_key: str | None
    spare_key: str | None
    ours: bool


def choose_target(
    settings: "Settings", environment: ClientEnvironment, base_url: str | None, api_key: str | None
) -> Target:
    """Options before environment before configuration.

    The first key of this installation never goes to a server on another machine, and OPENAI_API_KEY never to the
    configured gateway.
    """
    local = _local_url(settings)
    chosen = base_url or environment.base_url or local
    ours = chosen.rstrip("/") in (local, local.removesuffix("/v1"))
    key = api_key or environment.api_key
    if ours:
        return Target(local, key or _first_key(settings, environment), None, True)
    key = key or environment.openai_api_key
    spare = _first_key(settings, environment) if key is None and _is_loopback(chosen) else None
    return Target(chosen, key, spare, False)


async def connect(target: Target) -> ApiClient:
    """A client for the target. Raises `UserError` (USAGE) for a URL or key that cannot be used."""
    client = ApiClient(target.base_url, target.api_key)
    # Another server on this machine must not be given a key of ours: it is asked first what it is.
    if target.spare_key is not None and await client.is_helixflow():
        await client.close()
        return ApiClient(target.base_url, target.spare_key)
    return client


async def choose_model(client: ApiClient, settings: "Settings") -> str:
    """The first model of the server that is for chat. Raises `UserError` (MODEL) when it has none."""
    from helixflow.cli.served import served_models
    from helixflow.pool.catalogue import Catalogue

    catalogue = Catalogue.load()
    others = {name for name in catalogue.names() if (spec := catalogue.find(name)) and spec.task != "chat"}
    chat: set[str] = set()
    for model in served_models(settings):
        (chat.add if model.task == "chat" else others.add)(model.name)
    names = await client.list_models()
    for name in names:
        if name in chat or not (name in others or looks_like_embeddings(name)):
            return name
    raise UserError(f"{client.base_url} offers no chat model; name one with --model", ExitCode.MODEL)


def _local_url(settings: "Settings") -> str:
    """Where the gateway of this data directory listens, or would by its settings."""
    try:
        return f"{(settings.run_dir / 'gateway.url').read_text().strip()}/v1"
    except OSError:
        pass  # nothing has served here yet
    host = settings.gateway.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.gateway.http_port}/v1"


def _is_loopback(url: str) -> bool:
    try:
        return urlsplit(url).hostname in _LOOPBACK
    except ValueError:
        return False


def _first_key(settings: "Settings", environment: ClientEnvironment) -> str | None:
    if environment.bootstrap_api_key is not None:
        return environment.bootstrap_api_key
    try:
        return settings.bootstrap_key_file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        # Not there yet, or another user's: the server then says that a key is missing.
        return None
