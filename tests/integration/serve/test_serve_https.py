"""A whole node over its HTTPS port: models, signing keys and the admin API behind one certificate."""

import base64

from tests.harness.node import Node, eventually
from tests.harness.wire import request


async def test_one_port_serves_models_keys_and_administration(node: Node) -> None:
    async with await node.connect_tls() as wire:
        assert wire.writer.get_extra_info("ssl_object").version() == "TLSv1.3"
        assert (await wire.ask(node.chat_request(max_tokens=2))).json["choices"]
        published = await wire.ask(request("GET", "/.well-known/jwks.json"))
        key = published.json["keys"][0]
        assert len(base64.urlsafe_b64decode(key["n"] + "==")) == 512
        document = await wire.ask(request("GET", "/api/v1/openapi.json"))
        assert document.json["openapi"].startswith("3.")
        refused = await wire.ask(request("GET", "/api/v1/me"))
        assert (refused.status, refused.headers["content-type"]) == (401, "application/problem+json")
    await eventually(lambda: {"/api/v1/openapi.json", "/api/v1/me"} <= _served_over_tls(node))


def _served_over_tls(node: Node) -> set[str]:
    return {record["operation"] for record in node.records("request") if record["scheme"] == "https"}
