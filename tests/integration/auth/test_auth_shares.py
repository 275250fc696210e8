"""What organisations and keys get of engines that are full, and where calls may be served: as gateways hear of it."""

import pytest

from helixflow.auth.changes import ChangeFeed
from helixflow.auth.identity_service import IdentityService
from helixflow.clients.principals import principal_of_key
from helixflow.core.errors import ErrorKind
from helixflow.core.keys import hash_key
from helixflow.core.principal import Principal
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_ORGANISATION
from helixflow.settings.tree import AuthSettings
from helixflow.storage.schema import changes
from tests.harness.auth import Installation, refused


async def seen_by_gateways(auth: Installation, secret: str) -> Principal:
    async def no_keys() -> list[identity_pb2.SigningKey]:
        return []

    feed = ChangeFeed(auth.database, auth.clock)
    service = IdentityService(auth.database, feed, auth.clock, no_keys, AuthSettings())
    request = identity_pb2.ResolveKeyRequest(key_hash=hash_key(secret))
    return principal_of_key(await service.ResolveKey(request, None))  # type: ignore[arg-type]


async def test_shares_reach_gateways(auth: Installation) -> None:
    acme = await auth.add_organisation("Acme")
    project = await auth.add_project(acme, "Search")
    ada = await auth.add_person(acme, roles={"": "owner"})
    operator = await auth.add_person(await auth.add_organisation(), operator=True, roles={"": "viewer"})
    plain = await auth.call(ada, "CreateKey", pb.CreateKeyRequest(name="plain", project_id=project))
    assert (plain.key.priority, plain.key.weight) == (0, 100)
    seen = await seen_by_gateways(auth, plain.secret)
    assert (seen.priority, seen.weight, seen.organisation_weight, seen.residency) == (0, 100, 100, "")

    changed = await auth.call(
        operator, "SetShares", pb.SetSharesRequest(organisation_id=acme, share_weight=300, max_priority=5)
    )
    assert (changed.share_weight, changed.max_priority) == (300, 5)
    await auth.call(ada, "UpdateOrganisation", pb.UpdateOrganisationRequest(id=acme, residency="eu"))
    update = pb.UpdateKeyRequest(id=plain.key.id, priority=5, weight=7)
    await auth.call(ada, "UpdateKey", update)
    seen = await seen_by_gateways(auth, plain.secret)
    assert (seen.priority, seen.weight, seen.organisation_weight, seen.residency) == (5, 7, 300, "eu")
    # Both changes of the organisation were told: what is cached of its keys and tokens is forgotten.
    assert len(await auth.rows(changes, kind=CHANGE_KIND_ORGANISATION, subject_id=acme)) == 2
    assert [row.action for row in await auth.audited("") if row.action == "set_shares"] == ["set_shares"]

    rotated = await auth.call(ada, "RotateKey", pb.RotateKeyRequest(id=plain.key.id, overlap_s=60))
    assert (rotated.key.priority, rotated.key.weight) == (5, 7)
    # An operator takes the right to priorities back: at once, and without changing keys.
    await auth.call(operator, "SetShares", pb.SetSharesRequest(organisation_id=acme, max_priority=2))
    assert (await seen_by_gateways(auth, plain.secret)).priority == 2


async def test_nobody_gives_themselves_more(auth: Installation) -> None:
    acme = await auth.add_organisation("Acme")
    project = await auth.add_project(acme, "Search")
    ada = await auth.add_person(acme, roles={"": "owner"})
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(ada, "SetShares", pb.SetSharesRequest(organisation_id=acme, share_weight=10_000))
    for wrong, param in (
        (pb.CreateKeyRequest(name="k", project_id=project, priority=1), "priority"),
        (pb.CreateKeyRequest(name="k", project_id=project, priority=-11), "priority"),
        (pb.CreateKeyRequest(name="k", project_id=project, weight=-1), "weight"),
        (pb.CreateKeyRequest(name="k", project_id=project, weight=10_001), "weight"),
    ):
        async with refused(ErrorKind.UNPROCESSABLE, param):
            await auth.call(ada, "CreateKey", wrong)
    lower = pb.CreateKeyRequest(name="batch", project_id=project, priority=-10)
    assert (await auth.call(ada, "CreateKey", lower)).key.priority == -10


@pytest.mark.parametrize("region", ["EU", "e u", "-eu", "x" * 64, "eu\n"])
async def test_a_region_is_a_plain_label(auth: Installation, region: str) -> None:
    acme = await auth.add_organisation("Acme")
    ada = await auth.add_person(acme, roles={"": "owner"})
    async with refused(ErrorKind.UNPROCESSABLE, "residency"):
        await auth.call(ada, "UpdateOrganisation", pb.UpdateOrganisationRequest(id=acme, residency=region))
