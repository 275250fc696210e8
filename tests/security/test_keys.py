import random
import string
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixflow.core.errors import ErrorKind
from helixflow.core.keys import (
    CHALLENGE_PREFIX,
    KEY_LENGTH,
    PREFIX,
    REFRESH_PREFIX,
    TOKEN_PREFIX,
    generate_key,
    hash_key,
    is_well_formed,
    mask_key,
)
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.settings.tree import Settings
from helixflow.storage.engine import open_database
from helixflow.storage.sqlite import FILE_NAME
from helixflow.storage.upgrade import upgrade
from tests.harness.auth import Installation, Person, refused

PREFIXES = (PREFIX, REFRESH_PREFIX, TOKEN_PREFIX, CHALLENGE_PREFIX)


def near_misses(key: str) -> list[str]:
    swapped = key[:10] + key[11] + key[10] + key[12:] if key[10] != key[11] else key[:-1]
    return [
        key[:-1],
        key + "0",
        key + "\n",
        " " + key,
        key.swapcase(),
        "hfk-" + key[4:],
        key[:20] + "é" + key[21:],
        key[:20] + "\0" + key[21:],
        key[:20] + "٣" + key[21:],
        swapped,
    ]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_near_misses_and_wrong_checksums_are_refused_without_a_look_up(prefix: str) -> None:
    chance = random.Random(7)
    for _ in range(50):
        key = generate_key(prefix)
        assert is_well_formed(key, prefix)
        assert not any(is_well_formed(wrong, prefix) for wrong in near_misses(key))
        for _ in range(20):
            position = chance.randrange(len(prefix), KEY_LENGTH)
            other = chance.choice(string.ascii_letters + string.digits)
            changed = key[:position] + other + key[position + 1 :]
            assert is_well_formed(changed, prefix) is (changed == key)


def test_a_secret_of_one_kind_is_none_of_another() -> None:
    for prefix in PREFIXES:
        secret = generate_key(prefix)
        assert [is_well_formed(secret, other) for other in PREFIXES] == [other == prefix for other in PREFIXES]
        for other in PREFIXES:
            # The checksum covers the prefix: exchanging it is no way around.
            assert is_well_formed(other + secret[4:], other) is (other == prefix)


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.text(string.ascii_letters + string.digits, min_size=46, max_size=46).map(lambda text: PREFIX + text),
        st.binary(max_size=60).map(lambda data: PREFIX + data.decode("latin-1")),
    ),
    st.sampled_from(PREFIXES),
)
def test_the_parser_takes_anything_and_accepts_only_what_was_made(text: str, prefix: str) -> None:
    # Made up by chance with the right checksum: one in 57 thousand million.
    assert not is_well_formed(text, prefix)
    assert len(hash_key(text)) == 32
    assert len(mask_key(text)) <= 13
    assert len(text) < 20 or text not in mask_key(text)


@asynccontextmanager
async def installed(tmp_path: Path) -> AsyncIterator[tuple[Installation, str, Person]]:
    """An installation on SQLite under `tmp_path`, a project, and who owns it."""
    settings = Settings(data_dir=tmp_path)
    await upgrade(settings)
    database = open_database(settings)
    auth = Installation(database)
    acme = await auth.add_organisation()
    yield auth, await auth.add_project(acme), await auth.add_person(acme, roles={"": "owner"})
    await auth.close()
    await database.close()


async def test_names_with_metacharacters_are_stored_exactly(tmp_path: Path) -> None:
    names = [
        "'; DROP TABLE api_keys; --",
        '" OR 1=1 --',
        "a\\'b",
        "%_?:name",
        "{0} $1 @x",
        "<script>alert(1)</script>",
        "이름 — ñ 🔑",
        "pаypal",  # the second letter is Cyrillic
        "e\u0301 é",
        "x" * 100,
    ]
    async with installed(tmp_path) as (auth, search, ada):
        for name in names:
            made = await auth.call(ada, "CreateKey", pb.CreateKeyRequest(name=name, project_id=search))
            assert made.key.name == name
        listed = await auth.call(ada, "ListKeys", pb.ListInProjectRequest())
        assert sorted(key.name for key in listed.keys) == sorted(names)


async def test_names_that_could_fool_a_reader_are_refused(tmp_path: Path) -> None:
    async with installed(tmp_path) as (auth, search, ada):
        for name in ("", " ", "x" * 101, "two\nlines", "bell\a", "\x1b[31mred", "\u202eright-to-left", "\u200b"):
            async with refused(ErrorKind.UNPROCESSABLE, "name"):
                await auth.call(ada, "CreateKey", pb.CreateKeyRequest(name=name, project_id=search))


async def test_no_secret_reaches_the_disk(tmp_path: Path) -> None:
    secrets = []
    async with installed(tmp_path) as (auth, search, ada):
        for number in range(3):
            request = pb.CreateKeyRequest(name=f"key {number}", project_id=search)
            made = await auth.call(ada, "CreateKey", request, idempotency_key=f"i{number}")
            rotation = pb.RotateKeyRequest(id=made.key.id)
            rotated = await auth.call(ada, "RotateKey", rotation, idempotency_key=f"r{number}")
            secrets += [made.secret, rotated.secret]
        stored = b"".join(path.read_bytes() for path in tmp_path.glob(f"{FILE_NAME}*"))
    assert b"key 2" in stored
    for secret in secrets:
        assert secret.encode() not in stored
        assert secret[8:-4].encode() not in stored
