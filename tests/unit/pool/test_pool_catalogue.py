"""The shipped catalogue, and specifications of configured models."""

import pytest

from helixflow.core.errors import ExitCode, UserError
from helixflow.pool.catalogue import Catalogue
from helixflow.pool.sources.source import parse_source
from helixflow.settings.tree import DEFAULT_CHAT_MODEL, DEFAULT_EMBEDDING_MODEL

CATALOGUE = Catalogue.load()


def test_the_default_models_are_known() -> None:
    assert {DEFAULT_CHAT_MODEL, DEFAULT_EMBEDDING_MODEL} <= set(CATALOGUE.names())
    chat, embedding = CATALOGUE.find(DEFAULT_CHAT_MODEL), CATALOGUE.find(DEFAULT_EMBEDDING_MODEL)
    assert chat is not None and embedding is not None
    assert (chat.task, embedding.task) == ("chat", "embeddings")
    assert embedding.context == 512
    assert CATALOGUE.find("nothing") is None


@pytest.mark.parametrize("name", CATALOGUE.names())
def test_every_entry_is_complete(name: str) -> None:
    spec = CATALOGUE.find(name)
    assert spec is not None
    assert parse_source(spec.source).text == spec.source
    assert spec.sha256 is not None and spec.licence
    assert min(spec.context, spec.size_bytes, spec.disk_bytes, spec.ram_bytes) > 0
    if spec.conversion is not None:
        assert "tokenizer.json" in spec.conversion.inputs


def test_a_configured_model_with_a_known_source_inherits_what_is_known() -> None:
    known = CATALOGUE.find(DEFAULT_EMBEDDING_MODEL)
    assert known is not None
    spec = CATALOGUE.spec_for("mine", known.source, None, "embeddings")
    assert (spec.name, spec.sha256, spec.conversion) == ("mine", known.sha256, known.conversion)
    assert CATALOGUE.spec_for("mine", known.source, known.sha256, "embeddings") == spec


def test_a_configured_model_of_its_own() -> None:
    spec = CATALOGUE.spec_for("mine", "file:/m.gguf", "0" * 64, "chat")
    assert (spec.name, spec.source, spec.sha256, spec.task) == ("mine", "file:/m.gguf", "0" * 64, "chat")


def test_no_source_means_the_catalogue() -> None:
    assert CATALOGUE.spec_for(DEFAULT_CHAT_MODEL, None, None, "chat") == CATALOGUE.find(DEFAULT_CHAT_MODEL)
    with pytest.raises(UserError, match="not in the catalogue") as caught:
        CATALOGUE.spec_for("unknown", None, None, "chat")
    assert caught.value.exit_code is ExitCode.CONFIG
    assert DEFAULT_CHAT_MODEL in caught.value.message


def test_a_hash_that_contradicts_the_catalogue_is_refused() -> None:
    with pytest.raises(UserError, match="0000") as caught:
        CATALOGUE.spec_for(DEFAULT_CHAT_MODEL, None, "0" * 64, "chat")
    assert caught.value.exit_code is ExitCode.CONFIG
