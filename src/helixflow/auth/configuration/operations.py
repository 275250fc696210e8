"""ConfigurationService of proto/helixflow/auth/v1: what operators do with the serving configuration."""

import json
from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Row

from helixflow.auth.configuration.changing import Changing, Proposal, refusal
from helixflow.auth.configuration.differences import Difference, names_of
from helixflow.auth.configuration.feed import ServingFeed
from helixflow.auth.configuration.history import SUMMARIES, History, Origin, Version
from helixflow.auth.configuration.traffic import Traffic, recent_traffic
from helixflow.auth.dispatch import Conversation, Flow, Invocation, Operation
from helixflow.auth.paging import read_page
from helixflow.auth.unit import Unit
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import configuration_pb2 as pb
from helixflow.settings.configuration import Refused, parse_document
from helixflow.settings.masking import hide_secrets
from helixflow.storage.schema import serving_configurations as table

MAX_NOTE: Final = 500
_ORIGINS: Final[Mapping[str, Origin]] = {"": "api", "api": "api", "apply": "apply"}


class ConfigurationOperations:
    """All of ConfigurationService, for the dispatcher."""

    def __init__(self, feed: ServingFeed, history: History, changing: Changing) -> None:
        self._feed = feed
        self._history = history
        self._changing = changing

    def operations(self) -> Mapping[str, Operation | Conversation | Flow]:
        return {
            "GetConfiguration": self.get,
            "PlanConfiguration": self.plan,
            "ApplyConfiguration": self.apply,
            "ListConfigurations": Operation(_list_versions),
            "RestoreConfiguration": self.roll_back,
            "ListFollowers": self.list_followers,
        }

    async def get(self, invocation: Invocation, request: pb.GetConfigurationRequest, /) -> pb.Configuration:
        """Raises `HelixError` NOT_FOUND."""
        if not request.revision and (newest := await self._history.newest(invocation.lookups)) is not None:
            return _message(newest)
        return _message(await self._find(invocation, request.revision))

    async def plan(self, invocation: Invocation, request: pb.PlanConfigurationRequest, /) -> pb.ConfigurationPlan:
        """Raises `HelixError`: UNPROCESSABLE naming the path of what is wrong, NOT_FOUND."""
        document = request.document
        if not document:
            document = (await self._find(invocation, request.revision)).document
        proposal = await self._propose(document)
        traffic = await recent_traffic(invocation.lookups, invocation.now)
        remaining = names_of(proposal.complete)
        return pb.ConfigurationPlan(
            version=proposal.base.revision,
            changes=[_change(difference, traffic, remaining) for difference in proposal.differences],
        )

    async def apply(self, invocation: Invocation, request: pb.ApplyConfigurationRequest, /) -> pb.Configuration:
        """Raises `HelixError`: UNPROCESSABLE naming the path, PRECONDITION_FAILED, CONFLICT."""
        origin = _ORIGINS.get(request.origin)
        if origin is None:
            raise HelixError(ErrorKind.UNPROCESSABLE, "It comes from `api` or `apply`.", param="origin")
        _check_note(request.note)
        proposal = await self._propose(request.document)
        version = await self._changing.put_in_force(
            invocation.writing(), proposal, origin, request.note, if_version=request.if_version
        )
        return _message(version)

    async def roll_back(self, invocation: Invocation, request: pb.RestoreConfigurationRequest, /) -> pb.Configuration:
        """Raises `HelixError` as `apply`, and NOT_FOUND."""
        _check_note(request.note)
        earlier = await self._find(invocation, request.revision)
        proposal = await self._propose(earlier.document)
        note = request.note or f"back to {earlier.revision}"
        version = await self._changing.put_in_force(
            invocation.writing(), proposal, "rollback", note, if_version=request.if_version
        )
        return _message(version)

    async def list_followers(
        self, invocation: Invocation, request: pb.ListFollowersRequest, /
    ) -> pb.ListFollowersResponse:
        return pb.ListFollowersResponse(
            followers=[
                pb.Follower(
                    instance=one.instance,
                    service=one.service,
                    node=one.node,
                    version=one.revision,
                    problem=one.problem,
                )
                for one in self._feed.followers
            ]
        )

    async def _find(self, invocation: Invocation, revision: int) -> Version:
        found = await self._history.find(invocation.lookups, revision)
        if found is None:
            raise HelixError(ErrorKind.NOT_FOUND, f"There is no configuration {revision}.", param="revision")
        return found

    async def _propose(self, document: str) -> Proposal:
        try:
            return await self._changing.propose(document)
        except Refused as exc:
            raise refusal(exc) from exc


async def _list_versions(unit: Unit, request: pb.ListConfigurationsRequest) -> pb.ListConfigurationsResponse:
    rows, cursor = await read_page(
        unit.connection,
        SUMMARIES,
        (table.c.revision, table.c.origin),
        page_size=request.page_size,
        cursor=request.cursor,
    )
    return pb.ListConfigurationsResponse(configurations=map(_summary, rows), next_cursor=cursor)


def _summary(row: "Row[Any] | Version") -> pb.Configuration:
    return pb.Configuration(
        version=row.revision,
        created_at=row.created_at,
        actor_id=row.actor_id,
        actor_name=row.actor_name,
        origin=row.origin,
        note=row.note,
    )


def _message(version: Version) -> pb.Configuration:
    message = _summary(version)
    message.document = _render_hidden(version.document)
    return message


def _render_hidden(document: str) -> str:
    """The document as it may be shown."""
    return json.dumps(hide_secrets(parse_document(document)), ensure_ascii=False)


def _change(difference: Difference, traffic: Traffic, remaining: frozenset[str]) -> pb.ConfigurationChange:
    whole = not difference.deployment
    return pb.ConfigurationChange(
        model=difference.model,
        deployment=difference.deployment,
        kind=difference.kind,
        fields=[pb.FieldChange(name=one.name, before=one.before, after=one.after) for one in difference.fields],
        requests=traffic.of_models[difference.model] if whole else traffic.of_deployments[difference.deployment],
        unserved=whole and difference.kind == "removed" and difference.model not in remaining,
    )


def _check_note(note: str) -> None:
    if len(note) > MAX_NOTE:
        raise HelixError(ErrorKind.UNPROCESSABLE, f"A note has at most {MAX_NOTE} characters.", param="note")
