"""What a request must look like and how it is refused, seen on the wire."""

import asyncio
import gzip
from pathlib import Path

import pytest

from helixflow.core.keys import generate_key
from tests.harness.gateway import RunningGateway, run_gateway
from tests.harness.wire import request

HELLO = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
CHAT = "/v1/chat/completions"
# The upstream of `idle_gateway` cannot be reached: this status says that a request was accepted.
ACCEPTED = 502


async def test_no_key_is_refused_and_says_how_to_send_one(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        answer = await wire.ask(request("POST", CHAT, HELLO))
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.error["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in answer.error["message"]


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Basic Zm9vOmJhcg==", "Bearer hfk_mistyped", "Bearer sk-other", "Bearer \xe9", "Token x"],
)
async def test_malformed_keys_are_refused(idle_gateway: RunningGateway, value: str) -> None:
    async with await idle_gateway.connect() as wire:
        wire.send(b"GET /v1/models HTTP/1.1\r\nhost: t\r\nauthorization: " + value.encode("latin-1") + b"\r\n\r\n")
        answer = await wire.read()
        assert answer.status == 401
        assert answer.error["code"] == "invalid_api_key"
        assert (await wire.ask(request("GET", "/v1/models", key=idle_gateway.key))).status == 200


async def test_an_unknown_key_is_401_and_503_while_auth_is_down(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        assert (await wire.ask(request("GET", "/v1/models", key=generate_key()))).status == 401
        idle_gateway.resolver.down = True
        answer = await wire.ask(request("GET", "/v1/models", key=generate_key()))
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert (await wire.ask(request("GET", "/v1/models", key=idle_gateway.key))).status == 200


@pytest.mark.parametrize("form", ["bearer {}", "BEARER {}", "Bearer   {}  ", "  Bearer {}"])
async def test_the_scheme_is_case_insensitive_and_spaces_are_trimmed(idle_gateway: RunningGateway, form: str) -> None:
    async with await idle_gateway.connect() as wire:
        headers = {"authorization": form.format(idle_gateway.key)}
        assert (await wire.ask(request("GET", "/v1/models", headers=headers))).status == 200


async def test_a_sane_request_id_is_echoed_and_another_is_replaced(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        answer = await wire.ask(request("GET", "/livez", headers={"x-request-id": "my-id_1.2:3/4"}))
        assert answer.headers["x-request-id"] == "my-id_1.2:3/4"
        for odd in ("a b", "x" * 129, "é", "<script>"):
            answer = await wire.ask(request("GET", "/livez", headers={"x-request-id": odd}))
            assert answer.headers["x-request-id"].startswith("req_")


async def test_every_answer_has_a_request_id_of_its_own(idle_gateway: RunningGateway) -> None:
    ids = set()
    async with await idle_gateway.connect() as wire:
        for path in ("/livez", "/nowhere", "/v1/models", "/v1/chat/completions"):
            answer = await wire.ask(request("GET", path))
            ids.add(answer.headers["x-request-id"])
            assert "date" in answer.headers
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("GET", CHAT, "POST"), ("DELETE", CHAT, "POST"), ("POST", "/v1/models", "GET, HEAD"),
     ("PUT", "/livez", "GET, HEAD"), ("OPTIONS", CHAT, "POST"), ("DELETE", "/v1/models/m", "GET, HEAD")],
)  # fmt: skip
async def test_a_wrong_method_is_405_with_allow(
    idle_gateway: RunningGateway, method: str, path: str, allow: str
) -> None:
    answer = await idle_gateway.ask(method, path)
    assert answer.status == 405
    assert answer.headers["allow"] == allow
    assert answer.error["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/version", "/metrics", "/v1/models", "/v1/models/m"])
async def test_head_is_get_without_the_body(idle_gateway: RunningGateway, path: str) -> None:
    async with await idle_gateway.connect() as wire:
        head = await wire.ask(request("HEAD", path, key=idle_gateway.key), head_only=True)
        get = await wire.ask(request("GET", path, key=idle_gateway.key))
    assert head.status == get.status == 200
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # the figures change between the two
        assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.body))


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v1/chat", "/v1/models/", "/v2/models", "/%ff%fe", "/x%0Ay"])
async def test_unknown_paths_are_404_in_json(idle_gateway: RunningGateway, path: str) -> None:
    answer = await idle_gateway.ask("GET", path)
    assert answer.status == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.error["type"] == "invalid_request_error"


async def test_models_are_listed_and_found_by_names_with_slash_and_colon(idle_gateway: RunningGateway) -> None:
    answer = await idle_gateway.ask("GET", "/v1/models")
    assert answer.json["object"] == "list"
    assert [model["id"] for model in answer.json["data"]] == ["m", "org/m:1"]
    for path in ("/v1/models/org/m:1", "/v1/models/org%2Fm%3A1", "/v1/models/org%2Fm:1"):
        found = (await idle_gateway.ask("GET", path)).json
        assert set(found) == {"id", "object", "created", "owned_by"}
        assert (found["id"], found["object"]) == ("org/m:1", "model")
        assert isinstance(found["created"], int)
    missing = await idle_gateway.ask("GET", "/v1/models/org/m:2")
    assert missing.status == 404
    assert missing.error["code"] == "model_not_found"
    assert "'org/m:1'" in missing.error["message"]


async def test_an_unknown_model_is_404_naming_close_ones(idle_gateway: RunningGateway) -> None:
    answer = await idle_gateway.chat(HELLO.replace(b'"m"', b'"org/m:11"'))
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert answer.error["param"] == "model"
    assert "org/m:1" in answer.error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None), (b"{", None), (b"nul", None), (b"[]", None), (b'"x"', None), (b'{"model":"\xff"}', None),
        (b"\xef\xbb\xbf{}", None), (HELLO + b"x", None), (b"[" * 3000, None), (b"{}", "model"),
        (b'{"model":"m"}', "messages"), (b'{"model":"m","messages":[]}', "messages"),
        (b'{"model":"m","messages":[{"role":"user","content":1}]}', "messages[0].content"),
        (b'{"model":"m","messages":[{"role":"king","content":"x"}]}', "messages[0].role"),
        (HELLO[:-1] + b',"temperature":"1"}', "temperature"), (HELLO[:-1] + b',"n":true}', "n"),
        (HELLO[:-1] + b',"n":129}', "n"), (HELLO[:-1] + b',"max_tokens":0}', "max_tokens"),
        (HELLO[:-1] + b',"stream":1}', "stream"), (HELLO[:-1] + b',"stream_options":{}}', "stream_options"),
    ],
)  # fmt: skip
async def test_bad_bodies_are_400_and_the_connection_stays_usable(
    idle_gateway: RunningGateway, body: bytes, param: str | None
) -> None:
    async with await idle_gateway.connect() as wire:
        answer = await wire.ask(idle_gateway.chat_request(body))
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"
        assert answer.error["param"] == param
        assert (await wire.ask(request("GET", "/livez"))).status == 200


async def test_deeply_nested_json_is_400(idle_gateway: RunningGateway) -> None:
    answer = await idle_gateway.chat(HELLO[:-1] + b',"x":' + b"[" * 1900 + b"]" * 1900 + b"}")
    assert answer.status == 400
    assert "nested" in answer.error["message"]


async def test_of_duplicate_keys_the_last_counts(idle_gateway: RunningGateway) -> None:
    assert (await idle_gateway.chat(HELLO[:-1] + b',"n":200,"n":1}')).status in (400, ACCEPTED)
    answer = await idle_gateway.chat(HELLO[:-1] + b',"model":"nowhere"}')
    assert answer.error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [("text/plain", ACCEPTED), ("application/json; charset=utf-8", ACCEPTED), ("multipart/form-data; boundary=x", 415),
     ("image/png", 415), ("application/x-www-form-urlencoded", ACCEPTED)],
)  # fmt: skip
async def test_only_what_is_clearly_not_json_is_415(
    idle_gateway: RunningGateway, content_type: str, status: int
) -> None:
    assert (await idle_gateway.chat(HELLO, {"content-type": content_type})).status == status


async def test_gzip_bodies_are_decoded(idle_gateway: RunningGateway) -> None:
    gzipped = {"content-encoding": "gzip"}
    assert (await idle_gateway.chat(gzip.compress(HELLO), gzipped)).status == ACCEPTED
    assert (await idle_gateway.chat(HELLO, {"content-encoding": "identity"})).status == ACCEPTED
    assert (await idle_gateway.chat(HELLO, {"content-encoding": "br"})).status == 415


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (gzip.compress(HELLO)[:-9], 400),
        (b"", 400),
        (b"no gzip at all", 400),
        (gzip.compress(b" " * 1_000_000), 413),
        (gzip.compress(b'"' + b"a" * 5000 + b'"'), 413),
    ],
)
async def test_bad_gzip_bodies_and_bombs_are_refused(idle_gateway: RunningGateway, body: bytes, status: int) -> None:
    answer = await idle_gateway.chat(body, {"content-encoding": "gzip"})
    assert answer.status == status
    assert answer.error["type"] == "invalid_request_error"


async def test_expect_100_continue(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        whole = idle_gateway.chat_request(HELLO, {"expect": "100-continue"})
        interim = await wire.ask(whole[: -len(HELLO)])
        assert interim.status == 100
        assert (await wire.ask(HELLO)).status == ACCEPTED


async def test_expect_100_continue_is_answered_by_a_refusal_where_one_is_due(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        whole = request("POST", CHAT, HELLO, headers={"expect": "100-continue"})
        assert (await wire.ask(whole[: -len(HELLO)])).status == 401


async def test_413_by_content_length_comes_before_the_body(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        head = request("POST", CHAT, key=idle_gateway.key, headers={"content-length": "5000"})
        answer = await wire.ask(head)
        assert answer.status == 413
        assert answer.error["code"] == "request_too_large"
        assert "4096" in answer.error["message"]


async def test_413_by_chunks_comes_before_their_end(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        wire.send(request("POST", CHAT, key=idle_gateway.key, headers={"transfer-encoding": "chunked"}))
        answer = await wire.ask(b"1000\r\n" + b" " * 4096 + b"\r\n" + b"1000\r\n" + b" " * 4096 + b"\r\n")
        assert answer.status == 413


async def test_a_client_that_sends_its_whole_large_body_first_still_reads_the_413(
    idle_gateway: RunningGateway,
) -> None:
    """Most clients do: a reset while they write would hide the answer from them."""
    async with await idle_gateway.connect() as wire:
        wire.send(idle_gateway.chat_request(b" " * 8_000_000))
        async with asyncio.timeout(60):
            await wire.writer.drain()
        assert (await wire.read()).status == 413


async def test_chunked_bodies_are_read(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        wire.send(request("POST", CHAT, key=idle_gateway.key, headers={"transfer-encoding": "chunked"}))
        for byte in HELLO:
            wire.send(b"1\r\n%c\r\n" % byte)
        assert (await wire.ask(b"0\r\n\r\n")).status == ACCEPTED
        assert (await wire.ask(request("GET", "/livez"))).status == 200


@pytest.mark.parametrize(
    "head",
    [
        "content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        "content-length: 2\r\ncontent-length: 2\r\n\r\n{}",
        "content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n",
        "transfer-encoding: gzip, chunked, identity\r\n\r\n0\r\n\r\n",
        "x-folded: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
        "content-length: -1\r\n\r\n",
        "content-length: +2\r\n\r\n{}",
        "content-length: 2 2\r\n\r\n{}",
        "content-length: 99999999999999999999999\r\n\r\n",
        "bad header: x\r\n\r\n",
        "x-nul: a\0b\r\n\r\n",
        "transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)  # fmt: skip
async def test_ambiguous_framing_is_refused_and_the_connection_closed(idle_gateway: RunningGateway, head: str) -> None:
    async with await idle_gateway.connect() as wire:
        wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\n" + head.encode())
        wire.send(request("GET", "/smuggled"))
        got = await wire.closed()
    assert b"HTTP/1.1 404" not in got
    assert got.count(b"HTTP/1.1 4") <= 1
    if got:
        assert got.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401"))
        assert b'"error":{"message":' in got


@pytest.mark.parametrize(
    "line", ["GET / HTTP/9.9", "hello", "GET  HTTP/1.1", "\x16\x03\x01\x02\x00", "GET /\xff HTTP/1.1"]
)
async def test_what_is_not_http_gets_a_400_in_json(idle_gateway: RunningGateway, line: str) -> None:
    async with await idle_gateway.connect() as wire:
        wire.send(line.encode("latin-1") + b"\r\n\r\n")
        got = await wire.closed()
    assert got.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: " in got
    assert b'"type":"invalid_request_error"' in got


async def test_an_upgrade_that_we_do_not_offer_is_ignored(idle_gateway: RunningGateway) -> None:
    """Java's client asks for h2c on every plain connection (RFC 9110, 7.8: a server may ignore it)."""
    upgrade = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAEAAAAIAAAAB"}
    async with await idle_gateway.connect() as wire:
        assert (await wire.ask(request("GET", "/livez", headers=upgrade))).status == 200
        answer = await wire.ask(idle_gateway.chat_request(HELLO, upgrade))
        assert answer.status == ACCEPTED


async def test_a_head_that_is_too_large_is_431_in_json(idle_gateway: RunningGateway) -> None:
    for filler in ({"x": "a" * 9000}, {f"x-{n}": "a" * 90 for n in range(100)}):
        async with await idle_gateway.connect() as wire:
            wire.send(request("GET", "/livez", headers=filler))
            got = await wire.closed()
        assert got.startswith(b"HTTP/1.1 431 ")
        assert b'"error":{"message":' in got


async def test_a_header_without_end_is_not_kept(tmp_path: Path) -> None:
    async with run_gateway(tmp_path, {}, max_header_bytes=8192) as gateway, await gateway.connect() as wire:
        wire.send(b"GET /livez HTTP/1.1\r\nx: ")
        for _ in range(32):
            wire.send(b"a" * 65536)
        assert (await wire.closed()).startswith((b"HTTP/1.1 431 ", b""))


@pytest.mark.parametrize("start", [b"", b"GET /livez HTTP/1.1\r\nhost:"])
async def test_a_head_that_does_not_come_is_cut_off(idle_gateway: RunningGateway, start: bytes) -> None:
    async with await idle_gateway.connect() as wire:
        wire.send(start)
        got = await wire.closed()
    assert got.startswith(b"HTTP/1.1 408 ") if start else not got


@pytest.mark.parametrize("start", [b"", b'{"model":'])
async def test_a_body_that_does_not_come_is_408(idle_gateway: RunningGateway, start: bytes) -> None:
    async with await idle_gateway.connect() as wire:
        head = request("POST", CHAT, key=idle_gateway.key, headers={"content-length": "100"})
        answer = await wire.ask(head + start)
        assert answer.status == 408
        assert answer.error["code"] == "request_timeout"
        assert answer.headers["connection"] == "close"


async def test_a_refused_body_that_never_ends_is_cut_off(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        answer = await wire.ask(request("POST", CHAT, headers={"content-length": "100"}) + b"{")
        assert answer.status == 401
        await wire.closed()


async def test_refused_bodies_are_drained_and_the_connection_stays_usable(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        for _ in range(5):
            assert (await wire.ask(request("POST", CHAT, b" " * 300_000))).status == 401
        assert (await wire.ask(request("GET", "/livez"))).status == 200


async def test_pipelined_requests_are_answered_in_order(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        wire.send(
            request("GET", "/livez")
            + idle_gateway.chat_request(HELLO)
            + request("GET", "/nowhere")
            + request("POST", CHAT, HELLO)
            + request("GET", "/version")
        )
        assert [(await wire.read()).status for _ in range(5)] == [200, ACCEPTED, 404, 401, 200]


async def test_http_1_0_is_answered_and_closed(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        wire.send(b"GET /livez HTTP/1.0\r\n\r\n")
        got = await wire.closed()
    assert b" 200 OK\r\n" in got
    assert b'{"status":"alive"}' in got


async def test_absolute_targets_and_queries_find_their_path(idle_gateway: RunningGateway) -> None:
    assert (await idle_gateway.ask("GET", "/livez?x=1")).status == 200
    assert (await idle_gateway.ask("GET", "http://test/livez")).status == 200
    assert (await idle_gateway.ask("OPTIONS", "*")).status in (400, 404)


async def test_probes(idle_gateway: RunningGateway) -> None:
    assert (await idle_gateway.ask("GET", "/livez")).json == {"status": "alive"}
    assert (await idle_gateway.ask("GET", "/readyz")).json == {"status": "ready"}
    health = (await idle_gateway.ask("GET", "/health")).json
    assert (health["status"], health["problems"]) == ("ok", [])
    assert (await idle_gateway.ask("GET", "/version")).json["name"] == "helixflow"


async def test_a_request_without_host_is_refused(idle_gateway: RunningGateway) -> None:
    async with await idle_gateway.connect() as wire:
        answer = await wire.ask(b"GET /version HTTP/1.1\r\n\r\n")
        assert answer.status == 400
        assert "Host header" in answer.error["message"]
        assert (await wire.ask(b"GET /version HTTP/1.0\r\n\r\n")).status == 200
