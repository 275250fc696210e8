import pytest

from helixflow.pki.names import parse_spiffe_id, spiffe_id


def test_an_identity_reads_back() -> None:
    assert parse_spiffe_id(spiffe_id("helixflow.internal", "gateway")) == ("helixflow.internal", "gateway")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://helixflow.internal",
        "spiffe://helixflow.internal/",
        "spiffe:///gateway",
        "spiffe://helixflow.internal/a/gateway",
        "spiffe://helixflow.internal/gateway/",
        "spiffe://helixflow.internal/gateway?x=1",
        "spiffe://helixflow.internal/gateway#x",
        "spiffe://helixflow.internal//gateway",
        "SPIFFE://helixflow.internal/gateway",
        "https://helixflow.internal/gateway",
        "spiffe://helixflow.internal/Gateway",
        "spiffe://helixflow.internal/gateway\n",
        "spiffe://helixflow.internal/gаteway",  # a Cyrillic letter
        "spiffe://[/gateway",
    ],
)
def test_what_is_no_identity_is_refused(uri: str) -> None:
    with pytest.raises(ValueError):
        parse_spiffe_id(uri)
