"""Which models a node serves when it starts: those of its file, or those that were applied since the file changed."""

from pathlib import Path

from helixflow.auth.configuration.service import Found
from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.serving_cache import ServingCache, cache_of, digest_of, path_of, read_cache
from helixflow.launch.serving_rules import complete
from helixflow.pool.catalogue import Catalogue
from helixflow.settings.configuration import Refused, document_of, read_document
from helixflow.settings.tree import Settings


def decide_serving(settings: Settings, config: Path | None, catalogue: Catalogue) -> tuple[Settings, ServingCache]:
    """`settings` are as they were read, from `config` among others. Returns them with the complete models that are in
    force, and what is to be written down of it. Reads `data_dir/serving.json`, changes nothing.

    Raises `UserError`: CONFIG for models that cannot be served, STORAGE.
    """
    document = document_of(settings.models)
    digest = digest_of(document)
    said = "models" in settings.model_fields_set
    config_path = str(config.expanduser().absolute()) if config is not None else None
    cache = read_cache(settings)
    if cache is not None and cache.file_digest == digest:
        try:
            models = complete(read_document(cache.document), catalogue)
        except (Refused, UserError) as exc:
            message = (
                f"{path_of(settings)}: what was applied last cannot be served: {exc}; "
                "change the models of the configuration file, and they are served instead"
            )
            raise UserError(message, ExitCode.CONFIG) from exc
        revision, document = cache.revision, cache.document
    else:
        models, revision = complete(settings.models, catalogue), 0
    decided = cache_of(models, document=document, revision=revision, file_digest=digest, config=config_path, said=said)
    return settings.model_copy(update={"models": models}), decided


def found_by(cache: ServingCache) -> Found:
    """The same for the auth service. Raises `UserError` (CONFIG)."""
    return Found(cache.document, cache.models(), cache.revision, cache.said)
