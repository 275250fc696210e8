"""`data_dir/serving.json`: the models in force on this node, so that a start needs no database to know them.

Mode 0600 and always whole: values of headers may be secrets.
"""

import hashlib
from pathlib import Path
from typing import Final

import msgspec
import structlog

from helixflow.core.errors import ExitCode, UserError
from helixflow.pki.files import write_atomically
from helixflow.settings.configuration import Models, Refused, complete_document_of, read_document
from helixflow.settings.tree import Settings

NAME: Final = "serving.json"
_MAX_BYTES: Final = 64 * 2**20

log = structlog.get_logger("helixflow.configuration")


class ServingCache(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the file.

    `document` is as it was given, `complete` with what the catalogue says (see `settings.configuration`). `revision` is
    the version that it is in the history, 0 while it is not known there. `file_digest` is that of the document of the
    configuration file that was last taken notice of; `config` is where that lies, if there is one, and `said` whether
    it (or a variable) says anything of models.
    """

    revision: int
    document: str
    complete: str
    file_digest: str
    config: str | None = None
    said: bool = True

    @property
    def was_applied(self) -> bool:
        """Whether it is not what the configuration file says, but was put in force since."""
        return digest_of(self.document) != self.file_digest

    def models(self) -> Models:
        """The complete models. Raises `UserError` (CONFIG)."""
        try:
            return read_document(self.complete)
        except Refused as exc:
            raise UserError(f"{NAME}: {exc}", ExitCode.CONFIG) from exc


def digest_of(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()


def path_of(settings: Settings) -> Path:
    return settings.data_dir / NAME


def read_cache(settings: Settings) -> ServingCache | None:
    """None when there is none, or none that can be used, which is logged: what it says is in the history too.

    Raises `UserError` (STORAGE) when it cannot be read.
    """
    path = path_of(settings)
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=ServingCache)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise UserError(f"{path}: cannot be read: {exc.strerror}", ExitCode.STORAGE) from exc
    except msgspec.MsgspecError:
        log.warning("configuration.cache_unusable", file=str(path))
        return None


def write_cache(settings: Settings, cache: ServingCache) -> None:
    """Raises `UserError` (STORAGE)."""
    write_atomically(path_of(settings), msgspec.json.encode(cache), 0o600)


def keep_models(settings: Settings, models: Models) -> None:
    """For a node that is told complete models and knows no history: its next start serves them again, unless its own
    file has changed. Raises `UserError` (STORAGE).
    """
    if (cache := read_cache(settings)) is not None:
        complete = complete_document_of(models)
        write_cache(settings, msgspec.structs.replace(cache, document=complete, complete=complete))


def with_cached_models(settings: Settings) -> Settings:
    """The settings of a process of a node with the models that are in force now, which may be others than those that it
    was started with. Raises `UserError` (CONFIG, STORAGE).
    """
    cache = read_cache(settings)
    return settings if cache is None else settings.model_copy(update={"models": cache.models()})


def cache_of(
    models: Models, *, document: str, revision: int, file_digest: str, config: str | None, said: bool
) -> ServingCache:
    """Of complete `models`."""
    return ServingCache(
        revision=revision,
        document=document,
        complete=complete_document_of(models),
        file_digest=file_digest,
        config=config,
        said=said,
    )
