"""Which models a node serves when it starts."""

from pathlib import Path

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.launch.serving_cache import ServingCache, path_of, read_cache, with_cached_models, write_cache
from helixflow.launch.serving_start import decide_serving
from helixflow.pool.catalogue import Catalogue
from helixflow.settings.configuration import complete_document_of, document_of, read_document
from helixflow.settings.load import load_settings
from helixflow.settings.tree import Settings

CATALOGUE = Catalogue.load()
APPLIED = '{"models":[{"name":"applied","deployments":[{"engine":"openai","base_url":"http://127.0.0.1:9/v1"}]}]}'


def file(folder: Path, name: str) -> Path:
    path = folder / "helixflow.toml"
    path.write_text(
        f'[[models]]\nname = "{name}"\n[[models.deployments]]\nengine = "openai"\nbase_url = "http://h/v1"\n'
    )
    return path


def start(folder: Path, config: Path | None) -> tuple[Settings, ServingCache]:
    settings = load_settings(config, environ={}, overrides={"data_dir": str(folder)})
    return decide_serving(settings, config, CATALOGUE)


def apply(settings: Settings, cache: ServingCache, document: str = APPLIED) -> None:
    """As the control process keeps what was applied through the API."""
    complete = complete_document_of(read_document(document))
    write_cache(
        settings,
        ServingCache(
            revision=2, document=document, complete=complete, file_digest=cache.file_digest, config=cache.config
        ),
    )


def names(settings: Settings) -> list[str]:
    return [model.name for model in settings.models]


def test_the_first_start_serves_what_the_file_says(tmp_path: Path) -> None:
    config = file(tmp_path, "mine")
    settings, cache = start(tmp_path, config)
    assert names(settings) == ["mine"]
    assert (cache.revision, cache.config, cache.said) == (0, str(config), True)
    assert not path_of(settings).exists(), "nothing is written before the data directory is ours"


def test_without_a_file_the_default_models_are_served_complete(tmp_path: Path) -> None:
    settings, cache = start(tmp_path, None)
    assert names(settings) == ["smollm2-135m-instruct", "all-minilm-l6-v2"]
    assert all(model.deployments for model in settings.models)
    assert (cache.config, cache.said) == (None, False)


def test_what_was_applied_stays_until_the_file_changes(tmp_path: Path) -> None:
    config = file(tmp_path, "mine")
    apply(*start(tmp_path, config))
    settings, cache = start(tmp_path, config)
    assert (names(settings), cache.revision, cache.document) == (["applied"], 2, APPLIED)
    settings, cache = start(tmp_path, file(tmp_path, "edited"))
    assert (names(settings), cache.revision) == (["edited"], 0)
    assert cache.document == document_of(load_settings(config, environ={}).models)


def test_every_process_of_the_node_starts_with_what_was_applied(tmp_path: Path) -> None:
    launched, cache = start(tmp_path, file(tmp_path, "mine"))
    assert with_cached_models(launched) is launched
    apply(launched, cache)
    assert names(with_cached_models(launched)) == ["applied"]


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    settings, cache = start(tmp_path, None)
    write_cache(settings, cache)
    assert path_of(settings).stat().st_mode & 0o777 == 0o600
    assert read_cache(settings) == cache


def test_an_applied_configuration_that_cannot_be_served_any_more_says_how_to_go_on(tmp_path: Path) -> None:
    config = file(tmp_path, "mine")
    settings, cache = start(tmp_path, config)
    write_cache(settings, ServingCache(**{**_fields(cache), "document": '{"models":[{"name":"nobody-knows"}]}'}))
    with pytest.raises(UserError, match="change the models of the configuration file") as caught:
        start(tmp_path, config)
    assert caught.value.exit_code is ExitCode.CONFIG
    assert names(start(tmp_path, file(tmp_path, "edited"))[0]) == ["edited"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"revision": "x"}', b"\xff"])
def test_a_spoilt_file_is_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "serving.json").write_bytes(content)
    assert names(start(tmp_path, file(tmp_path, "mine"))[0]) == ["mine"]


def _fields(cache: ServingCache) -> dict[str, object]:
    return {name: getattr(cache, name) for name in cache.__struct_fields__}
