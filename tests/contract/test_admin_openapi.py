"""The admin API keeps to its own document: whatever is sent, no 5xx, and every answer is one that the document has.

A few generated requests for each operation, valid and invalid ones, always the same, against a real node.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.config import SchemathesisConfig

from helixflow.console.app import create_app
from helixflow.console.document import build_document
from tests.harness.node import Node, run_node, write_idle_config
from tests.harness.visitor import PASSWORD, visit

EXAMPLES = 3
# Whether a valid request succeeds depends on what there is: names of roles, the rules for passwords.
UNKNOWABLE = ("positive_data_acceptance",)


class NoChannel:
    """Endpoints are bound to it and never call it: only the document is wanted."""

    def unary_unary(self, *_: Any, **__: Any) -> None:
        return None

    unary_stream = unary_unary


def _document() -> dict[str, Any]:
    channel: Any = NoChannel()
    return build_document(create_app(channel))


DOCUMENT = _document()
schema = schemathesis.openapi.from_dict(
    DOCUMENT,
    config=SchemathesisConfig.from_dict(
        {
            "checks": {name: {"enabled": False} for name in UNKNOWABLE},
            # Beside random requests: the bounds of every field and parameter, and one method that a path does not have.
            "phases": {"coverage": {"enabled": True, "unexpected-methods": ["TRACE"]}},
            "seed": 1,
        }
    ),
)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("openapi")
    settings = {
        "HELIXFLOW_CONFIG": str(write_idle_config(folder)),
        # Hundreds of requests to its paths of sign-in are to be answered by what they are, not by how many.
        "HELIXFLOW_GATEWAY__SIGN_INS_PER_MINUTE": "1000000",
    }
    with run_node(folder / "data", **settings) as running:
        yield running


def test_the_node_serves_this_document(node: Node) -> None:
    answer = httpx2.get(f"http://127.0.0.1:{node.port}/api/v1/openapi.json", timeout=120)
    assert answer.json() == DOCUMENT


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_conforms(case: schemathesis.Case, node: Node) -> None:
    headers = {"Authorization": f"Bearer {node.key}"}
    case.call_and_validate(base_url=f"http://127.0.0.1:{node.port}", headers=headers, timeout=120)


async def test_what_only_real_credentials_are_refused_conforms(node: Node) -> None:
    """The right password, but not for that place, and not any more."""
    async with visit(node) as operator:
        project = (await operator.make("/projects", {"name": "of the invitations"}))["id"]
        other = await operator.make("/organisations", {"name": "Foreign", "owner_email": "owner@foreign.example"})
        foreign = {"organisation_id": other["organisation"]["id"]}
        ada = await operator.new_user("ada.conforms@example.com", "viewer")
        signed_in = await operator.sign_in("ada.conforms@example.com")
        invited = {"email": "ada.conforms@example.com", "role": "developer", "project_id": project}
        invitation = {"token": (await operator.make("/invitations", invited))["token"], "password": PASSWORD}
        credentials = {"email": "ada.conforms@example.com", "password": PASSWORD}
        refresh = {"refresh_token": signed_in.refresh_token}
        await answers(node, "/auth/login", credentials, 200)
        await answers(node, "/auth/login", {**credentials, "password": "not that pass phrase"}, 401)
        await answers(node, "/auth/login", credentials | foreign, 404, "not_found")
        await answers(node, "/auth/login", credentials | {"project_id": "proj_0"}, 404, "not_found")
        await answers(node, "/auth/refresh", refresh | foreign, 404, "not_found")
        await operator.do("POST", f"/users/{ada}/suspend")
        await answers(node, "/auth/login", credentials, 403, "permission_denied")
        await answers(node, "/auth/refresh", refresh, 401, "invalid_token")
        await answers(node, "/auth/redeem", invitation, 403, "permission_denied")
        await operator.do("POST", f"/users/{ada}/reinstate")
        await operator.do("PUT", f"/members/{ada}?project_id={project}", {"role": "billing"})
        await answers(node, "/auth/redeem", invitation, 409, "conflict")
        await answers(node, "/auth/redeem", invitation | {"token": signed_in.refresh_token}, 401, "invalid_token")


async def answers(node: Node, path: str, body: dict[str, str], status: int, code: str = "") -> None:
    """That it is answered with that status, as the document says."""
    case = schema[f"/api/v1{path}"]["POST"].Case(body=body, media_type="application/json")
    base_url = f"http://127.0.0.1:{node.port}"
    response = await asyncio.to_thread(case.call, base_url=base_url, timeout=120)
    assert response.status_code == status, response.text
    assert not code or response.json()["code"] == code
    case.validate_response(response)
