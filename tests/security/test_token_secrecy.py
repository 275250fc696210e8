"""Nothing that a gateway writes at the finest level shows a token, be it good, ended or forged."""

from pathlib import Path

import pytest

from helixflow.rpc.generated.auth_v1 import identity_pb2 as pb
from helixflow.settings.tree import LogSettings
from helixflow.transport.testing import Reset, ScriptedUpstream, answer
from tests.harness.gateway import provider, run_gateway
from tests.harness.tokens import TokenMint, change
from tests.harness.wire import request

CHAT = b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}'


async def test_tokens_are_in_no_log_line_and_no_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stranger = TokenMint("stranger")
    (tmp_path / "run").mkdir()
    answers = b""
    async with (
        ScriptedUpstream([[answer(b"{}")], [Reset()], [answer(b"no json")]]) as upstream,
        ScriptedUpstream([[answer(b"{}")], [Reset()]], path=tmp_path / "run" / "admin.sock"),
        run_gateway(
            tmp_path, {"m": [provider(upstream.base_url)]}, log=LogSettings(level="debug", format="json")
        ) as gateway,
    ):
        good = gateway.mint.token()
        bad = [
            good[:-4] + b"AAAA",
            stranger.token(),
            gateway.mint.token(exp=1),
            gateway.mint.token(project=""),
            good + b"\xe9",
        ]
        async with await gateway.connect() as wire:
            for token in (good, good, good, *bad):
                text = token.decode("latin-1")
                for method, path, body in (
                    ("POST", "/v1/chat/completions", CHAT),
                    ("GET", "/v1/models", None),
                    ("GET", "/api/v1/me", None),
                ):
                    head = request(method, path, body).replace(
                        b"\r\n\r\n", b"\r\nauthorization: Bearer " + text.encode("latin-1") + b"\r\n\r\n", 1
                    )
                    answers += (await wire.ask(head)).body
            gateway.tell(change(11, pb.CHANGE_KIND_SESSION, "ses_1"))
            got = await wire.ask(request("GET", "/v1/models", key=good.decode()))
            assert got.status == 401
            answers += got.body
    out, err = capfd.readouterr()
    assert '"event":"request"' in err
    written = answers + (out + err).encode()
    for token in (good, *bad):
        for part in token.split(b".")[1:]:
            assert part[:40] not in written
    # Whom it speaks for is told by the account's id alone.
    assert b'"key_id":"acc_1"' in written
    assert b"Ada" not in written and b"ses_1" not in written
