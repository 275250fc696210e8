"""What the admin API makes of requests about journals, and of the answers."""

import httpx2

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2
from helixflow.rpc.generated.auth_v1 import usage_pb2 as pb
from tests.harness.scripted_auth import ScriptedAuth

ID = "a" * 24
JOURNAL = pb.Journal(id=ID, node_id="00112233aabbccdd", opened_at=1_763_837_000, position=70, age_s=100)


async def test_journals_are_listed_and_given_up(api: httpx2.AsyncClient, auth: ScriptedAuth) -> None:
    auth.answers["ListJournals"] = pb.ListJournalsResponse(journals=[JOURNAL], next_cursor="more")
    listed = (await api.get("/journals")).json()
    assert (listed["data"], listed["next_cursor"]) == (
        [
            {
                "id": ID,
                "node_id": "00112233aabbccdd",
                "opened_at": "2025-11-22T18:43:20Z",
                "shipped_at": None,
                "position": 70,
                "age_s": 100,
            }
        ],
        "more",
    )
    assert auth.last.request == pb.ListJournalsRequest(page_size=20)
    auth.answers["CloseJournal"] = pb.Journal(id=ID, opened_at=1_763_837_000)
    closed = await api.post(f"/journals/{ID}/close")
    assert (closed.status_code, closed.json()["node_id"]) == (200, None)
    assert auth.last.request == admin_pb2.GetRequest(id=ID)
    auth.answers["CloseJournal"] = HelixError(ErrorKind.CONFLICT, "This journal is closed.")
    assert (await api.post(f"/journals/{ID}/close")).status_code == 409
