"""A new operator's first day: from the bootstrap key to users, tokens and keys that reach the models."""

import asyncio
import ssl

import grpc
import pytest

from helixflow.pki.identity import ServiceIdentity
from helixflow.pki.names import server_name
from helixflow.rpc.channels import create_blocking_channel
from helixflow.rpc.generated.auth_v1 import admin_pb2, admin_pb2_grpc
from helixflow.settings.tree import Settings
from tests.harness.node import CHAT_MODEL, EMBEDDING_MODEL, EMBEDDINGS, WAIT_S, Node, eventually
from tests.harness.visitor import visit
from tests.harness.wire import request


async def test_from_the_bootstrap_key_to_a_chat(node: Node) -> None:
    async with visit(node) as operator:
        user_id = await operator.new_user("ada@first.example", "owner")
        ada = await operator.sign_in("ada@first.example")
        me = (await ada.admin("GET", "/me")).json()
        assert (me["kind"], me["id"], me["roles"], me["operator"]) == ("account", user_id, ["owner"], False)
        assert (await ada.chat()).json()["choices"][0]["message"]["content"]
        program = await ada.new_key("program")
        answer = await program.chat()
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 2
        project = await ada.make("/projects", {"name": "Research"})
        elsewhere = await ada.new_key("research", project_id=project["id"])
        assert (await elsewhere.chat()).status_code == 200
        await eventually(lambda: [r for r in node.records("request") if r["project"] == project["id"]])


async def test_a_key_sees_the_models_that_it_is_for(node: Node) -> None:
    async with visit(node) as operator:
        key = await operator.new_key("chat only", models=[CHAT_MODEL])
        assert [model["id"] for model in (await key.models()).json()["data"]] == [CHAT_MODEL]
        assert (await key.chat()).status_code == 200
        body = {"model": EMBEDDING_MODEL, "input": "x"}
        refused = await key.ask("POST", EMBEDDINGS, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
        hidden = await key.ask("GET", f"/v1/models/{EMBEDDING_MODEL}")
        unknown = await key.ask("GET", "/v1/models/no-such-model")
        assert hidden.status_code == unknown.status_code == 404
        assert hidden.text.replace(EMBEDDING_MODEL, "m") == unknown.text.replace("no-such-model", "m")


async def test_a_key_works_from_its_networks_and_nobody_can_claim_to_be_there(node: Node) -> None:
    async with visit(node) as operator:
        here = await operator.new_key("here", networks=["127.0.0.0/8"])
        there = await operator.new_key("there", networks=["10.0.0.0/8"])
        assert (await here.models()).status_code == 200
        for headers in ({}, {"x_forwarded_for": "10.0.0.1"}, {"forwarded": "for=10.0.0.1", "x_real_ip": "10.0.0.1"}):
            refused = await there.chat(**headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
            assert (await there.admin("GET", "/me", **headers)).status_code in (401, 403)
        # Nor does a list keep the right one out.
        assert (await here.chat(x_forwarded_for="10.0.0.1")).status_code == 200


async def test_scopes_are_the_most_that_a_key_can_do(node: Node) -> None:
    async with visit(node) as operator:
        reader = await operator.new_key("reader", scopes=["models:read"])
        assert (await reader.models()).status_code == 200
        refused = await reader.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
        assert (await reader.admin("POST", "/projects", {"name": "mine"})).status_code == 403
        keeper = await operator.new_key("keeper", scopes=["keys:create", "keys:read"])
        beyond = await keeper.admin("POST", "/keys", {"name": "more", "scopes": ["users:delete"]})
        assert beyond.status_code in (403, 422), beyond.text


@pytest.mark.parametrize("credential", ["", "hfk_wrong", "a.b.c", "eyJhbGciOiJub25lIn0.e30."])
async def test_nobody_gets_in_without_a_credential(node: Node, credential: str) -> None:
    async with visit(node, credential) as stranger:
        for answer in (await stranger.models(), await stranger.chat(), await stranger.admin("GET", "/me")):
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
        assert (await stranger.ask("GET", "/.well-known/jwks.json")).status_code == 200


async def test_https_is_trusted_with_the_local_authority_alone(node: Node) -> None:
    trusting = ssl.create_default_context(cafile=node.ca_file)
    async with visit(node, base_url=f"https://localhost:{node.https_port}", verify=trusting) as operator:
        assert (await operator.models()).status_code == 200
        assert (await operator.admin("GET", "/me")).status_code == 200
    async with await node.connect_tls() as wire:
        session = wire.writer.get_extra_info("ssl_object")
        assert session.version() == "TLSv1.3"
        assert (await wire.ask(request("GET", "/v1/models", key=node.key))).status == 200
    old = ssl.create_default_context(cafile=node.ca_file)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", node.https_port, ssl=old)
    with pytest.raises(ssl.SSLCertVerificationError):
        await asyncio.open_connection("127.0.0.1", node.https_port, ssl=ssl.create_default_context())


def auth_address(node: Node) -> str:
    """Where the auth service listens, which had the choice."""
    return (node.data_dir / "run" / "auth.address").read_text().strip()


async def test_the_auth_port_is_for_services_and_each_for_its_own_rpcs(node: Node) -> None:
    settings = Settings(data_dir=node.data_dir)
    address = auth_address(node)

    def administer(channel: grpc.Channel) -> grpc.StatusCode:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListOrganisations(
                admin_pb2.ListRequest(), timeout=WAIT_S, metadata=(("authorization", f"Bearer {node.key}"),)
            )
        return caught.value.code()

    def as_gateway() -> grpc.StatusCode:
        identity = ServiceIdentity.open(settings, "gateway")
        with create_blocking_channel(address, identity, "auth") as channel:
            return administer(channel)

    def as_nobody() -> grpc.StatusCode:
        credentials = grpc.ssl_channel_credentials(root_certificates=node.ca_file.read_bytes())
        name = server_name(settings.pki.trust_domain, "auth")
        options = [("grpc.ssl_target_name_override", name)]
        with grpc.secure_channel(address, credentials, options=options) as channel:
            return administer(channel)

    assert await asyncio.to_thread(as_gateway) is grpc.StatusCode.PERMISSION_DENIED
    assert await asyncio.to_thread(as_nobody) is grpc.StatusCode.UNAVAILABLE
