import hashlib

from helixflow.core.keys import KEY_LENGTH, PREFIX, generate_key, hash_key, is_well_formed, mask_key


def test_generated_keys_are_well_formed_and_never_repeat() -> None:
    keys = {generate_key() for _ in range(200)}
    assert len(keys) == 200
    assert all(is_well_formed(key) and len(key) == KEY_LENGTH and key.startswith(PREFIX) for key in keys)


def test_the_stored_hash_is_the_sha256_of_the_whole_key() -> None:
    key = generate_key()
    assert hash_key(key) == hashlib.sha256(key.encode()).digest()


def test_every_single_changed_character_is_noticed() -> None:
    key = generate_key()
    for position in range(len(PREFIX), len(key)):
        other = "A" if key[position] != "A" else "B"
        assert not is_well_formed(key[:position] + other + key[position + 1 :])


def test_a_masked_key_shows_too_little_to_use_it() -> None:
    key = generate_key()
    masked = mask_key(key)
    assert masked.startswith(key[:8])
    assert len(masked) <= 13
    assert mask_key("secret-of-another-kind") == "secr…"
