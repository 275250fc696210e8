"""The models that HelixFlow knows by name, and what is known of a model that only a configuration names."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from typing import Annotated, Literal

import msgspec

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.presets import Presets
from helixflow.pool.sources.source import parse_source

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Task = Literal["chat", "embeddings"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """How the fetched file becomes a GGUF.

    `inputs` are further files beside it with their hashes, `tokenizer.json` among them; `version` counts changes of the
    converter, so that what an older one made is made again; `sha256` is the result's, None if it is not known.
    """

    kind: Literal["bert"]
    version: int
    inputs: dict[str, Sha256]
    sha256: Sha256 | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What to pull and how to check it.

    `sha256` is that of the file the source names, None if it is not known. `context` in tokens, sizes in bytes;
    0 where unknown: `size_bytes` of the stored file, `disk_bytes` at the pull's peak, `ram_bytes` when it serves.
    """

    name: str
    source: str
    task: Task
    sha256: Sha256 | None = None
    licence: str = ""
    context: int = 0
    size_bytes: int = 0
    disk_bytes: int = 0
    ram_bytes: int = 0
    conversion: Conversion | None = None


@dataclass(frozen=True, slots=True)
class _File:
    models: list[ModelSpec]


class Catalogue:
    """Specifications by name."""

    def __init__(self, specs: Iterable[ModelSpec]) -> None:
        self._specs: Mapping[str, ModelSpec] = {spec.name: spec for spec in specs}

    @classmethod
    def load(cls) -> "Catalogue":
        """The catalogue that is shipped with this version."""
        text = resources.files("helixflow.pool").joinpath("catalogue.toml").read_text(encoding="utf-8")
        return cls(msgspec.convert(tomllib.loads(text), _File).models)

    @cached_property
    def presets(self) -> Presets:
        """Further models by name: at providers, or to be fetched without a known hash."""
        return Presets.load()

    def find(self, name: str) -> ModelSpec | None:
        return self._specs.get(name)

    def names(self) -> list[str]:
        return sorted(self._specs)

    def spec_for(self, name: str, source: str | None, sha256: str | None, task: Task) -> ModelSpec:
        """The specification of a configured model.

        A source that the catalogue knows brings its hash, licence, task and conversion along; no source means the
        catalogue's model of that name. Raises `UserError` (CONFIG): unknown name, malformed source, or a `sha256` that
        contradicts the catalogue.
        """
        if source is None:
            known = self.find(name)
            if known is None:
                names = ", ".join(self.names())
                raise UserError(
                    f"model {name!r} has no source and is not in the catalogue; give a source or use one of: {names}",
                    ExitCode.CONFIG,
                )
        else:
            text = parse_source(source).text
            known = next((spec for spec in self._specs.values() if parse_source(spec.source).text == text), None)
            if known is None:
                return ModelSpec(name=name, source=text, task=task, sha256=sha256)
        if sha256 is not None and sha256 not in (known.sha256, known.conversion and known.conversion.sha256):
            raise UserError(
                f"model {name!r}: configured sha256 {sha256}, but {known.source} has {known.sha256}",
                ExitCode.CONFIG,
            )
        return replace(known, name=name)
