import pytest

from helixflow.auth.lockout import ADDRESS_FAILURES, EMAIL_FAILURES, LONGEST_LOCK_S, _site, lock_s


def test_locks_double_from_the_threshold_on_up_to_a_quarter_of_an_hour() -> None:
    for threshold in (EMAIL_FAILURES, ADDRESS_FAILURES):
        assert [lock_s(failures, threshold) for failures in range(threshold)] == [0] * threshold
        assert [lock_s(threshold + more, threshold) for more in range(10)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
        assert lock_s(threshold + 10, threshold) == lock_s(10**9, threshold) == LONGEST_LOCK_S


@pytest.mark.parametrize(
    ("address", "site"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("not an address", "not an address"),
    ],
)
def test_whom_an_address_stands_for(address: str, site: str) -> None:
    assert _site(address) == site
