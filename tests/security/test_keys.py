import random
import string
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from helixflow.auth.keys import KeyDirectory
from helixflow.core.clock import SystemClock
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import KEY_LENGTH, PREFIX, generate_key, hash_key, is_well_formed
from helixflow.storage.engine import database_path, open_database
from helixflow.storage.upgrade import upgrade


@pytest.fixture
async def directory(tmp_path: Path) -> AsyncIterator[KeyDirectory]:
    database = open_database(tmp_path)
    await upgrade(database.path)
    directory = KeyDirectory(database, SystemClock())
    await directory.ensure_defaults()
    yield directory
    await database.close()


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


def test_near_misses_and_wrong_checksums_are_refused_without_a_look_up() -> None:
    chance = random.Random(7)
    for _ in range(50):
        key = generate_key()
        assert not any(is_well_formed(wrong) for wrong in near_misses(key))
        for _ in range(20):
            position = chance.randrange(len(PREFIX), KEY_LENGTH)
            other = chance.choice(string.ascii_letters + string.digits)
            changed = key[:position] + other + key[position + 1 :]
            assert is_well_formed(changed) is (changed == key)


async def test_a_well_formed_key_that_was_never_made_is_not_found(directory: KeyDirectory) -> None:
    _, secret = await directory.create("real")
    assert (await directory.resolve(hash_key(secret)))[0].key_name == "real"
    for wrong in (hash_key(generate_key()), hash_key(secret)[:-1] + b"\0", bytes(32), b"", b"%" * 32):
        with pytest.raises(HelixError) as caught:
            await directory.resolve(wrong)
        assert caught.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.parametrize(
    "name",
    [
        "'; DROP TABLE api_keys; --",
        '" OR 1=1 --',
        "a\\'b",
        "%_?:name",
        "{0} $1 @x",
        "<script>alert(1)</script>",
        "이름 — ñ 🔑",
        "x" * 100,
    ],
)
async def test_names_with_metacharacters_are_stored_exactly(directory: KeyDirectory, name: str) -> None:
    record, secret = await directory.create(name)
    assert record.name == name
    assert [key.name for key in await directory.list_keys()] == [name]
    assert (await directory.resolve(hash_key(secret)))[0].key_name == name


@pytest.mark.parametrize(
    "name", ["", " ", "x" * 101, "two\nlines", "bell\a", "\x1b[31mred", "\u202eright-to-left", "\0"]
)
async def test_names_that_could_fool_a_reader_are_refused(directory: KeyDirectory, name: str) -> None:
    with pytest.raises(HelixError) as caught:
        await directory.create(name)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.INVALID_VALUE, "name")


async def test_ids_are_not_patterns(directory: KeyDirectory) -> None:
    await directory.create("one")
    for key_id in ("%", "key_%", "' OR '1'='1", "", "\0"):
        with pytest.raises(HelixError) as caught:
            await directory.revoke(key_id)
        assert caught.value.kind is ErrorKind.NOT_FOUND
    assert [key.revoked_at for key in await directory.list_keys()] == [0]


async def test_no_secret_reaches_the_disk(directory: KeyDirectory, tmp_path: Path) -> None:
    secrets = [(await directory.create(f"key {number}"))[1] for number in range(5)]
    stored = b"".join(path.read_bytes() for path in tmp_path.glob(f"{database_path(tmp_path).name}*"))
    assert b"key 3" in stored
    for secret in secrets:
        assert secret.encode() not in stored
        assert secret[8:-4].encode() not in stored
