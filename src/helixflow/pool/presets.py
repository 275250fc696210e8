"""Models that are configured by their name alone: where they are served, and how their provider is reached."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct, convert

from helixflow.core.errors import ExitCode, UserError
from helixflow.settings.deployments import (
    AnthropicDeployment,
    Deployment,
    LlamaCppDeployment,
    OllamaDeployment,
    OpenAIDeployment,
)

_KINDS: Final[Mapping[str, type[OpenAIDeployment] | type[AnthropicDeployment] | type[OllamaDeployment]]] = {
    "openai": OpenAIDeployment,
    "anthropic": AnthropicDeployment,
    "ollama": OllamaDeployment,
}


class KnownProvider(Struct, frozen=True, forbid_unknown_fields=True):
    """How a provider is reached. `api_key_env` is the variable in which its own tools look for the key."""

    name: str
    engine: Literal["openai", "anthropic", "ollama"]
    base_url: str
    api_key_env: str


class Preset(Struct, frozen=True, forbid_unknown_fields=True):
    """A model at `provider` (called `model` there, where that is not the name), or one to be fetched from `source`.
    `context` is in tokens, 0 where it is not known.
    """

    name: str
    provider: str = ""
    model: str = ""
    source: str = ""
    context: int = 0


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    providers: list[KnownProvider]
    presets: list[Preset]


class Presets:
    """Presets by name."""

    def __init__(self, providers: Iterable[KnownProvider], presets: Iterable[Preset]) -> None:
        self._providers: Mapping[str, KnownProvider] = {provider.name: provider for provider in providers}
        self._presets: Mapping[str, Preset] = {preset.name: preset for preset in presets}

    @classmethod
    def load(cls) -> "Presets":
        """Those that are shipped with this version."""
        text = resources.files("helixflow.pool").joinpath("presets.toml").read_text(encoding="utf-8")
        file = convert(tomllib.loads(text), _File)
        return cls(file.providers, file.presets)

    def all(self) -> list[Preset]:
        """In the order of the file."""
        return list(self._presets.values())

    def find(self, name: str) -> Preset | None:
        return self._presets.get(name)

    def provider_of(self, preset: Preset) -> KnownProvider | None:
        """None for a model that is served here."""
        return self._providers[preset.provider] if preset.provider else None

    def require(self, name: str) -> Preset:
        """Raises `UserError` (CONFIG) with names that are like it."""
        preset = self.find(name)
        if preset is not None:
            return preset
        close = difflib.get_close_matches(name, self._presets, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "`helixflow models presets` lists them"
        raise UserError(f"there is no preset {name!r}; {hint}", ExitCode.CONFIG)

    def deployment(self, preset: Preset, api_key_file: Path | None = None) -> Deployment:
        """What serves it. The key is in `api_key_file`, else in the variable that is usual for the provider."""
        provider = self.provider_of(preset)
        context = {"context": preset.context} if preset.context else {}
        if provider is None:
            return LlamaCppDeployment(engine="llama_cpp", source=preset.source, load="first_use", **context)
        key = {"api_key_env": provider.api_key_env} if api_key_file is None else {"api_key_file": api_key_file}
        kind = _KINDS[provider.engine]
        return kind.model_validate(
            {
                "engine": provider.engine,
                "base_url": provider.base_url,
                "model": preset.model or preset.name,
                **context,
                **key,
            }
        )
