from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from helixflow.auth.authentication import find_key, held_by_key
from helixflow.auth.changes import ChangeFeed
from helixflow.auth.identity_service import IdentityService
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.keys import hash_key, is_well_formed
from helixflow.core.permissions import Permission
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.rpc.generated.auth_v1 import identity_pb2
from helixflow.rpc.generated.auth_v1.identity_pb2 import CHANGE_KIND_KEY
from helixflow.settings.tree import AuthSettings
from helixflow.storage.engine import Database
from helixflow.storage.schema import api_keys, changes
from tests.harness.auth import Installation, Person, refused


@dataclass(frozen=True, slots=True)
class World:
    """An organisation with two projects, its owner, a developer of the first project alone, and a stranger."""

    auth: Installation
    acme: str
    search: str
    chat: str
    ada: Person
    bob: Person
    eve: Person
    elsewhere: str

    async def create(self, caller: Person | str, **fields: Any) -> pb.CreateKeyResponse:
        request = pb.CreateKeyRequest(**{"name": "a key", "project_id": self.search, **fields})
        made: pb.CreateKeyResponse = await self.auth.call(caller, "CreateKey", request)
        return made

    async def works(self, secret: str) -> frozenset[Permission] | None:
        """What a key may do in its project now, None when it does not work."""
        async with self.auth.database.reading() as connection:
            row = await find_key(connection, hash_key(secret))
            assert row is not None
            held = await held_by_key(connection, row, self.auth.clock.now())
        return None if held is None else held.grants.within(row.project_id)

    async def service_account(self, role: str, project_id: str = "") -> str:
        request = pb.CreateServiceAccountRequest(name="robot", project_id=project_id, role=role)
        return str((await self.auth.call(self.ada, "CreateServiceAccount", request)).id)


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    auth = Installation(database)
    acme, other = await auth.add_organisation("Acme"), await auth.add_organisation("Other")
    search, chat = await auth.add_project(acme, "Search"), await auth.add_project(acme, "Chat")
    yield World(
        auth,
        acme,
        search,
        chat,
        await auth.add_person(acme, roles={"": "owner"}),
        await auth.add_person(acme, roles={search: "developer"}),
        await auth.add_person(other, roles={"": "owner"}),
        await auth.add_project(other, "Theirs"),
    )
    await auth.close()


async def test_a_key_is_made_with_its_restrictions_and_its_secret_is_kept_nowhere(world: World) -> None:
    made = await world.create(
        world.bob,
        name="build robot",
        scopes=["models:use", "keys:read"],
        models=["smollm2", "all-minilm"],
        networks=["10.0.0.0/8", "192.0.2.1"],
        expires_at=world.auth.now + 60,
    )
    key = made.key
    assert is_well_formed(made.secret)
    assert (key.name, key.project_id, key.owner_id, key.created_by) == ("build robot", world.search, "", world.bob.id)
    assert list(key.scopes) == ["keys:read", "models:use"]
    assert list(key.models) == ["all-minilm", "smollm2"]
    assert list(key.networks) == ["10.0.0.0/8", "192.0.2.1/32"]
    assert (key.expires_at, key.revoked_at, key.version) == (world.auth.now + 60, 0, 1)
    assert key.hint == made.secret[:8] + "…" + made.secret[-4:]
    assert await world.works(made.secret) == {Permission.MODELS_USE, Permission.KEYS_READ}
    assert await world.auth.call(world.bob, "GetKey", pb.GetRequest(id=key.id)) == key

    records = await world.auth.audited(world.acme, action="create_key")
    assert [record.target_id for record in records] == [key.id]
    written = repr([*records, *await world.auth.rows(api_keys), *await world.auth.rows(changes)])
    for part in (made.secret, made.secret[8:-4]):
        assert part not in written
    assert hash_key(made.secret).hex() not in repr(records)


async def test_by_default_a_key_uses_models_in_the_project_of_the_credential(world: World) -> None:
    with pytest.raises(HelixError) as caught:
        await world.create(world.ada, project_id="")
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNPROCESSABLE, "project_id")
    first = await world.create(world.ada, scopes=["keys:create", "models:use", "models:read"])
    second = await world.create(first.secret, project_id="")
    assert second.key.project_id == world.search
    assert second.key.created_by == first.key.id
    assert list(second.key.scopes) == ["models:read", "models:use"]


async def test_bad_fields_are_named(world: World) -> None:
    for field, wrong in (
        ("name", ""),
        ("name", "x" * 101),
        ("name", "a\nb"),
        ("scopes", ["nothing:at_all"]),
        ("scopes", ["metrics:read"]),
        ("scopes", ["users:delete"]),
        ("models", ["a b"]),
        ("networks", ["10.0.0.1/8"]),
        ("expires_at", 1),
        ("owner_id", "user_unknown"),
        ("owner_id", "' OR '1'='1"),
    ):
        async with refused(ErrorKind.UNPROCESSABLE, field):
            await world.create(world.ada, **{field: wrong})
    assert await world.auth.rows(api_keys) == []


async def resolved(world: World, secret: str) -> set[str]:
    """What a gateway hears that the key may do."""

    async def no_keys() -> list[identity_pb2.SigningKey]:
        return []

    auth = world.auth
    service = IdentityService(auth.database, ChangeFeed(auth.database, auth.clock), auth.clock, no_keys, AuthSettings())
    request = identity_pb2.ResolveKeyRequest(key_hash=hash_key(secret))
    return set((await service.ResolveKey(request, None)).permissions)  # type: ignore[arg-type]


@pytest.mark.parametrize("owner", ["nobody", "oneself", "a service account"])
async def test_operators_make_keys_that_read_metrics_and_nobody_hands_them_on(world: World, owner: str) -> None:
    auth, ada = world.auth, world.ada
    operator = await auth.add_person(world.acme, roles={"": "owner"}, operator=True)
    owners = {"nobody": "", "oneself": operator.id, "a service account": await world.service_account("developer")}
    scopes = ["metrics:read", "keys:create", "keys:update"]
    scraper = await world.create(operator, owner_id=owners[owner], scopes=scopes)
    assert await resolved(world, scraper.secret) == set(scopes)
    for caller in (ada, scraper.secret):
        async with refused(ErrorKind.UNPROCESSABLE, "scopes"):
            await world.create(caller, scopes=["metrics:read"])
        for rpc, request in (
            ("UpdateKey", pb.UpdateKeyRequest(id=scraper.key.id, name="mine")),
            ("RotateKey", pb.RotateKeyRequest(id=scraper.key.id)),
        ):
            with pytest.raises(HelixError) as caught:
                await auth.call(caller, rpc, request)
            assert caught.value.kind is ErrorKind.PERMISSION_DENIED
    for name in ("organisations:create", "organisations:list", "signing_keys:rotate"):
        async with refused(ErrorKind.UNPROCESSABLE, "scopes"):
            await world.create(operator, scopes=[name])
    rotated = await auth.call(operator, "RotateKey", pb.RotateKeyRequest(id=scraper.key.id))
    assert await resolved(world, rotated.secret) == set(scopes)
    # What it reads is metrics, not what operators see.
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(rotated.secret, "ListOrganisations", pb.ListRequest())
    await auth.call(ada, "RevokeKey", pb.ChangeRequest(id=rotated.key.id))
    async with refused(ErrorKind.NOT_FOUND):
        await resolved(world, rotated.secret)


async def test_other_organisations_have_no_such_projects_and_keys(world: World) -> None:
    made = await world.create(world.ada)
    async with refused(ErrorKind.NOT_FOUND, "project_id"):
        await world.create(world.ada, project_id=world.elsewhere)
    async with refused(ErrorKind.NOT_FOUND, "project_id"):
        await world.auth.call(world.ada, "ListKeys", pb.ListInProjectRequest(project_id=world.elsewhere))
    for rpc, request in (
        ("GetKey", pb.GetRequest(id=made.key.id)),
        ("UpdateKey", pb.UpdateKeyRequest(id=made.key.id, name="mine")),
        ("RotateKey", pb.RotateKeyRequest(id=made.key.id)),
        ("RevokeKey", pb.ChangeRequest(id=made.key.id)),
    ):
        async with refused(ErrorKind.NOT_FOUND, "id"):
            await world.auth.call(world.eve, rpc, request)
    assert (await world.auth.call(world.eve, "ListKeys", pb.ListInProjectRequest())).keys == []
    assert await world.works(made.secret) is not None


async def test_ids_are_no_patterns(world: World) -> None:
    made = await world.create(world.ada)
    for key_id in ("%", "key_%", "' OR '1'='1", "", "key_\ufffd", "x" * 10_000):
        async with refused(ErrorKind.NOT_FOUND, "id"):
            await world.auth.call(world.ada, "RevokeKey", pb.ChangeRequest(id=key_id))
    assert await world.works(made.secret) is not None


async def test_lists_show_what_the_caller_may_see_newest_first(world: World) -> None:
    names = {}
    for number, project in enumerate((world.search, world.chat, world.search, world.chat)):
        names[f"k{number}"] = (await world.create(world.ada, name=f"k{number}", project_id=project)).key.id
        world.auth.clock.advance(1)

    async def listed(caller: Person, **fields: Any) -> list[str]:
        found, cursor = [], ""
        while True:
            request = pb.ListInProjectRequest(page_size=1, cursor=cursor, **fields)
            page = await world.auth.call(caller, "ListKeys", request)
            found += [key.name for key in page.keys]
            cursor = page.next_cursor
            if not cursor:
                return found

    assert await listed(world.ada) == ["k3", "k2", "k1", "k0"]
    assert await listed(world.ada, project_id=world.chat) == ["k3", "k1"]
    assert await listed(world.bob) == ["k2", "k0"]
    async with refused(ErrorKind.PERMISSION_DENIED):
        await listed(world.bob, project_id=world.chat)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await world.auth.call(world.bob, "GetKey", pb.GetRequest(id=names["k1"]))


async def test_nobody_gives_a_key_what_they_may_not_do_themselves(world: World) -> None:
    async with refused(ErrorKind.PERMISSION_DENIED, "scopes"):
        await world.create(world.bob, scopes=["models:use", "projects:delete"])
    async with refused(ErrorKind.PERMISSION_DENIED):
        await world.create(world.bob, project_id=world.chat)
    small = await world.create(world.bob, scopes=["keys:create", "keys:update"])
    async with refused(ErrorKind.PERMISSION_DENIED, "scopes"):
        await world.create(small.secret, scopes=["models:use"])
    async with refused(ErrorKind.PERMISSION_DENIED, "scopes"):
        await world.create(small.secret)
    denied = await world.auth.audited(world.acme, outcome="denied")
    assert [(record.action, record.actor_id) for record in denied] == [
        ("create_key", world.bob.id),
        ("create_key", world.bob.id),
        ("create_key", small.key.id),
        ("create_key", small.key.id),
    ]


async def test_a_key_of_a_service_account_needs_all_that_it_would_hold_also_elsewhere(world: World) -> None:
    everywhere = await world.service_account("developer")
    here = await world.service_account("developer", world.search)
    there = await world.service_account("developer", world.chat)
    # The developer of one project holds the same permissions, but only there.
    async with refused(ErrorKind.PERMISSION_DENIED, "scopes"):
        await world.create(world.bob, owner_id=everywhere)
    async with refused(ErrorKind.UNPROCESSABLE, "owner_id"):
        await world.create(world.bob, owner_id=there)
    made = await world.create(world.bob, owner_id=here, scopes=["models:use"])
    assert made.key.owner_id == here
    async with refused(ErrorKind.UNPROCESSABLE, "scopes"):
        await world.create(world.ada, owner_id=here, scopes=["projects:delete"])
    async with refused(ErrorKind.UNPROCESSABLE, "scopes"):
        await world.create(world.ada, owner_id=here, scopes=["users:read"])
    wide = await world.create(world.ada, owner_id=everywhere, scopes=["roles:read", "keys:create", "keys:update"])
    assert await world.works(wide.secret) == {Permission.ROLES_READ, Permission.KEYS_CREATE, Permission.KEYS_UPDATE}
    # Nor may they change or rotate what somebody else made of it.
    for rpc, request in (
        ("UpdateKey", pb.UpdateKeyRequest(id=wide.key.id, name="mine")),
        ("RotateKey", pb.RotateKeyRequest(id=wide.key.id)),
    ):
        async with refused(ErrorKind.PERMISSION_DENIED, "scopes"):
            await world.auth.call(world.bob, rpc, request)
    # But stop it, if it gets lost.
    await world.auth.call(world.bob, "RevokeKey", pb.ChangeRequest(id=wide.key.id))
    assert await world.works(wide.secret) is None


async def test_an_own_key_follows_its_owner_and_is_nobody_elses(world: World) -> None:
    async with refused(ErrorKind.UNPROCESSABLE, "owner_id"):
        await world.create(world.ada, owner_id=world.bob.id)
    own = await world.create(world.bob, owner_id=world.bob.id, scopes=["models:use", "keys:create"])
    # Its keys are those of its owner, too.
    child = await world.create(own.secret, owner_id=world.bob.id, scopes=["models:use"])
    assert child.key.created_by == world.bob.id
    # An administrator may restrict it, and gets no secret that would act as somebody else.
    await world.auth.call(
        world.ada, "UpdateKey", pb.UpdateKeyRequest(id=own.key.id, models=pb.StringList(values=["smollm2"]))
    )
    async with refused(ErrorKind.PERMISSION_DENIED):
        await world.auth.call(world.ada, "RotateKey", pb.RotateKeyRequest(id=own.key.id))
    async with refused(ErrorKind.UNPROCESSABLE, "scopes"):
        request = pb.UpdateKeyRequest(id=own.key.id, scopes=pb.StringList(values=["projects:delete"]))
        await world.auth.call(world.ada, "UpdateKey", request)
    member = pb.SetMemberRequest(user_id=world.bob.id, project_id=world.search, role="viewer")
    await world.auth.call(world.ada, "SetMember", member)
    assert await world.works(own.secret) == frozenset()


async def test_a_restricted_key_makes_no_key_that_is_less_restricted(world: World) -> None:
    limits = {"models": ["smollm2"], "expires_at": world.auth.now + 60}
    made = await world.create(world.ada, scopes=["keys:create", "keys:update", "models:use"], **limits)
    async with refused(ErrorKind.PERMISSION_DENIED, "models"):
        await world.create(made.secret, scopes=["models:use"])
    async with refused(ErrorKind.PERMISSION_DENIED, "expires_at"):
        await world.create(made.secret, scopes=["models:use"], models=["smollm2"])
    child = await world.create(made.secret, scopes=["models:use"], **limits)
    for key_id in (child.key.id, made.key.id):
        async with refused(ErrorKind.PERMISSION_DENIED, "models"):
            await world.auth.call(made.secret, "UpdateKey", pb.UpdateKeyRequest(id=key_id, models=pb.StringList()))
        async with refused(ErrorKind.PERMISSION_DENIED, "expires_at"):
            await world.auth.call(made.secret, "UpdateKey", pb.UpdateKeyRequest(id=key_id, expires_at=0))
    free = await world.create(world.ada, scopes=["models:use"])
    async with refused(ErrorKind.PERMISSION_DENIED, "models"):
        await world.auth.call(made.secret, "RotateKey", pb.RotateKeyRequest(id=free.key.id))


async def test_an_update_changes_what_is_given_and_tells_the_gateways(world: World) -> None:
    key = (await world.create(world.bob, models=["a"], expires_at=world.auth.now + 60)).key
    assert await world.auth.told() == []
    world.auth.clock.advance(10)
    request = pb.UpdateKeyRequest(
        id=key.id, if_version=1, scopes=pb.StringList(values=["models:read"]), models=pb.StringList(), expires_at=0
    )
    changed = await world.auth.call(world.bob, "UpdateKey", request)
    assert (changed.name, list(changed.scopes), list(changed.models)) == ("a key", ["models:read"], [])
    assert (changed.expires_at, changed.version, changed.updated_at) == (0, 2, key.updated_at + 10)
    (row,) = await world.auth.rows(changes)
    stored = (await world.auth.rows(api_keys, id=key.id))[0]
    assert (row.kind, row.subject_id, row.key_hash) == (CHANGE_KIND_KEY, key.id, stored.hash)
    (record,) = await world.auth.audited(world.acme, action="update_key")
    assert '"models":["a"]' in record.before
    assert '"models":[]' in record.after

    async with refused(ErrorKind.PRECONDITION_FAILED, None):
        await world.auth.call(world.bob, "UpdateKey", request)
    async with refused(ErrorKind.UNPROCESSABLE, "scopes"):
        await world.auth.call(world.bob, "UpdateKey", pb.UpdateKeyRequest(id=key.id, scopes=pb.StringList()))
    # The same again is no change.
    assert (await world.auth.call(world.bob, "UpdateKey", pb.UpdateKeyRequest(id=key.id, name="a key"))) == changed
    assert len(await world.auth.rows(changes)) == 1


async def test_a_rotated_key_goes_on_for_the_overlap_and_has_one_successor(world: World) -> None:
    old = await world.create(world.bob, models=["a"], networks=["10.0.0.0/8"], scopes=["models:use"])
    async with refused(ErrorKind.UNPROCESSABLE, "overlap_s"):
        await world.auth.call(world.bob, "RotateKey", pb.RotateKeyRequest(id=old.key.id, overlap_s=30 * 86_400 + 1))
    made = await world.auth.call(world.bob, "RotateKey", pb.RotateKeyRequest(id=old.key.id, overlap_s=60))
    assert made.key.rotated_from == old.key.id
    for name in ("name", "project_id", "owner_id", "scopes", "models", "networks", "expires_at"):
        assert getattr(made.key, name) == getattr(old.key, name)
    assert (made.replaced.id, made.replaced.expires_at) == (old.key.id, world.auth.now + 60)
    assert await world.works(old.secret) == await world.works(made.secret) == {Permission.MODELS_USE}
    assert [change[1] for change in await world.auth.told()] == [old.key.id]
    for rpc, request in (
        ("RotateKey", pb.RotateKeyRequest(id=old.key.id)),
        ("UpdateKey", pb.UpdateKeyRequest(id=old.key.id, expires_at=0)),
    ):
        async with refused(ErrorKind.CONFLICT):
            await world.auth.call(world.bob, rpc, request)
    world.auth.clock.advance(60)
    assert await world.works(old.secret) is None
    assert await world.works(made.secret) is not None


async def test_a_rotation_never_lengthens_a_life(world: World) -> None:
    old = await world.create(world.bob, expires_at=world.auth.now + 60)
    made = await world.auth.call(world.bob, "RotateKey", pb.RotateKeyRequest(id=old.key.id, overlap_s=3600))
    assert made.replaced.expires_at == made.key.expires_at == world.auth.now + 60
    at_once = await world.auth.call(world.bob, "RotateKey", pb.RotateKeyRequest(id=made.key.id))
    assert at_once.replaced.revoked_at == world.auth.now
    assert await world.works(made.secret) is None
    world.auth.clock.advance(60)
    for rpc, request in (
        ("RotateKey", pb.RotateKeyRequest(id=at_once.key.id)),
        ("UpdateKey", pb.UpdateKeyRequest(id=at_once.key.id, expires_at=0)),
    ):
        async with refused(ErrorKind.CONFLICT):
            await world.auth.call(world.ada, rpc, request)
    assert await world.works(at_once.secret) is None


async def test_a_revoked_key_stays_revoked(world: World) -> None:
    made = await world.create(world.bob)
    revoked = await world.auth.call(world.bob, "RevokeKey", pb.ChangeRequest(id=made.key.id, if_version=1))
    assert revoked.revoked_at == world.auth.now
    world.auth.clock.advance(5)
    assert await world.auth.call(world.bob, "RevokeKey", pb.ChangeRequest(id=made.key.id)) == revoked
    assert len(await world.auth.told()) == 1
    for rpc, request in (
        ("RotateKey", pb.RotateKeyRequest(id=made.key.id)),
        ("UpdateKey", pb.UpdateKeyRequest(id=made.key.id, expires_at=world.auth.now + 60)),
    ):
        async with refused(ErrorKind.CONFLICT):
            await world.auth.call(world.bob, rpc, request)
    async with refused(ErrorKind.INVALID_API_KEY):
        await world.auth.call(made.secret, "ListKeys", pb.ListInProjectRequest())


async def test_the_bootstrap_key_can_be_revoked_by_operators_and_otherwise_stays_as_it_is(world: World) -> None:
    key_id, secret = await world.auth.add_key(world.acme, world.search, bootstrap=True)
    for rpc, request in (
        ("RotateKey", pb.RotateKeyRequest(id=key_id)),
        ("UpdateKey", pb.UpdateKeyRequest(id=key_id, name="mine")),
    ):
        with pytest.raises(HelixError, match="HELIXFLOW_BOOTSTRAP_API_KEY") as caught:
            await world.auth.call(secret, rpc, request)
        assert caught.value.kind is ErrorKind.CONFLICT
    async with refused(ErrorKind.PERMISSION_DENIED):
        await world.auth.call(world.ada, "RevokeKey", pb.ChangeRequest(id=key_id))
    made = await world.create(secret, scopes=["projects:delete"])
    assert made.key.created_by == key_id
    assert (await world.auth.call(secret, "RevokeKey", pb.ChangeRequest(id=key_id))).revoked_at
    async with refused(ErrorKind.INVALID_API_KEY):
        await world.auth.call(secret, "ListKeys", pb.ListInProjectRequest())
