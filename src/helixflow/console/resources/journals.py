"""What gateways have recorded and the ledger still waits for."""

from typing import Annotated

from fastapi import Path
from pydantic import Field

from helixflow.console.endpoint import USAGE, endpoint
from helixflow.console.fields import Identifier, Moment, OptionalMoment, OptionalText
from helixflow.console.models import Page, Shown
from helixflow.rpc.generated.auth_v1 import admin_pb2, usage_pb2

_ID = ["9f86d081884c7d65a1b2c3d4"]
Id = Annotated[Identifier, Path(description="The journal.", examples=_ID)]


class Journal(Shown):
    """The journal of one gateway process."""

    id: str = Field(description="Its id.", examples=_ID)
    node_id: OptionalText = Field(
        description="The node whose shipper brings it; null: it was given up, any node closes it.",
        examples=["00112233aabbccdd"],
    )
    opened_at: Moment = Field(description="When its gateway began.")
    shipped_at: OptionalMoment = Field(description="When it brought something last; null: nothing yet.")
    position: int = Field(description="Up to where the ledger has it, bytes.", examples=[81920])
    age_s: int = Field(description="Seconds since it was opened.", examples=[3600])


class JournalPage(Page[Journal]):
    """One page of journals."""


@endpoint("GET", "/journals", USAGE["ListJournals"], JournalPage)
def list_journals() -> usage_pb2.ListJournalsRequest:
    """Journals that may still bring requests, the oldest first: of running gateways, and of those that nobody has
    closed yet.
    """
    return usage_pb2.ListJournalsRequest()


@endpoint("POST", "/journals/{id}/close", USAGE["CloseJournal"], Journal)
def close_journal(id: Id) -> admin_pb2.GetRequest:
    """Gives up the journal of a node that never comes back. Within a minute another node closes it: what its calls are
    known to hold is charged, what else it had not shipped is lost. 409 while its node is there.
    """
    return admin_pb2.GetRequest(id=id)


ENDPOINTS = (list_journals, close_journal)
