import asyncio
import hashlib

import msgspec

from helixflow.auth.idempotency import KEEP_S, prune_idempotency_keys
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.rpc.generated.auth_v1 import admin_pb2 as pb
from helixflow.settings.tree import Settings
from helixflow.storage.engine import open_database
from helixflow.storage.schema import api_keys, idempotency_keys
from tests.harness.auth import Installation, refused

KEY = "0b1c9a5e-77aa"


async def test_a_request_that_is_sent_twice_is_done_once_and_answered_alike(auth: Installation) -> None:
    acme = await auth.add_organisation()
    search = await auth.add_project(acme)
    ada = await auth.add_person(acme, roles={"": "owner"})
    request = pb.CreateKeyRequest(name="one", project_id=search)
    first = await auth.call(ada, "CreateKey", request, idempotency_key=KEY)
    auth.clock.advance(KEEP_S - 1)
    ada_later = await auth.sign_in(ada.id, acme)
    assert await auth.call(ada_later, "CreateKey", request, idempotency_key=KEY) == first
    assert len(await auth.rows(api_keys)) == len(await auth.audited(acme)) == 1
    (row,) = await auth.rows(idempotency_keys)
    assert first.secret.encode() not in row.response
    # Another key, another request: both are new.
    assert (await auth.call(ada_later, "CreateKey", request, idempotency_key="other")).secret != first.secret
    auth.clock.advance(1)
    ada_later = await auth.sign_in(ada.id, acme)
    assert (await auth.call(ada_later, "CreateKey", request, idempotency_key=KEY)).secret != first.secret
    assert len(await auth.rows(api_keys)) == 3


async def test_what_is_remembered_says_nothing_of_a_password(auth: Installation) -> None:
    """The request is remembered to tell others from it. A plain hash of it would be a way to try passwords."""
    acme = await auth.add_organisation()
    ada = await auth.add_person(acme, roles={"": "owner"})
    request = pb.CreateUserRequest(email="bob@example.com", name="Bob", password="a long enough pass phrase")
    made = await auth.call(ada, "CreateUser", request, idempotency_key=KEY)
    (row,) = await auth.rows(idempotency_keys)
    said = request.SerializeToString()
    method = b"helixflow.auth.v1.AdminService.CreateUser\0"
    parts = (acme.encode() + b"\0", b"\0")
    inside = hashlib.sha256(b"".join((*parts, method, said))).digest()
    context = f"{ada.id}\0{KEY}"
    # That is the hash which is kept, and it is kept sealed: nothing else of the row knows it or anything like it.
    kept = msgspec.msgpack.decode(auth.sealer.open("idempotency", row.response, context))
    assert kept == [inside, None, made.SerializeToString()]
    stored = repr(row._asdict())
    assert row._asdict().keys() == {"caller_id", "key", "response", "created_at"}
    for known in (inside, hashlib.sha256(said).digest(), hashlib.sha256(method + said).digest()):
        assert known not in row.response and known.hex() not in stored


async def test_a_key_belongs_to_one_request_and_one_caller(auth: Installation) -> None:
    acme = await auth.add_organisation()
    search, chat = await auth.add_project(acme), await auth.add_project(acme, "Chat")
    ada, bob = [await auth.add_person(acme, roles={"": "owner"}) for _ in range(2)]
    request = pb.CreateKeyRequest(name="one", project_id=search)
    first = await auth.call(ada, "CreateKey", request, idempotency_key=KEY)
    assert (await auth.call(bob, "CreateKey", request, idempotency_key=KEY)).secret != first.secret
    for rpc, other in (
        ("CreateKey", pb.CreateKeyRequest(name="two", project_id=search)),
        ("CreateProject", pb.CreateProjectRequest(name="one")),
    ):
        try:
            await auth.call(ada, rpc, other, idempotency_key=KEY)
        except HelixError as exc:
            assert (exc.kind, exc.code) == (ErrorKind.UNPROCESSABLE, "idempotency_key_reused")
        else:
            raise AssertionError("the key was taken for another request")
    # The same bytes mean another project with another credential.
    default = pb.CreateKeyRequest(name="one")
    await auth.call(await auth.sign_in(ada.id, acme, search), "CreateKey", default, idempotency_key="p")
    async with refused(ErrorKind.UNPROCESSABLE, "Idempotency-Key"):
        await auth.call(await auth.sign_in(ada.id, acme, chat), "CreateKey", default, idempotency_key="p")
    for malformed in ("x" * 256, "a b", "ä", "a\n"):
        async with refused(ErrorKind.UNPROCESSABLE, "Idempotency-Key"):
            await auth.call(ada, "CreateKey", request, idempotency_key=malformed)


async def test_what_failed_is_not_remembered_and_who_lost_the_right_gets_no_old_answer(auth: Installation) -> None:
    acme = await auth.add_organisation()
    search = await auth.add_project(acme)
    ada = await auth.add_person(acme, roles={"": "owner"})
    bob = await auth.add_person(acme, roles={search: "developer"})
    async with refused(ErrorKind.UNPROCESSABLE, "name"):
        await auth.call(bob, "CreateKey", pb.CreateKeyRequest(project_id=search), idempotency_key=KEY)
    request = pb.CreateKeyRequest(name="one", project_id=search)
    await auth.call(bob, "CreateKey", request, idempotency_key=KEY)
    member = pb.SetMemberRequest(user_id=bob.id, project_id=search, role="viewer")
    await auth.call(ada, "SetMember", member)
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(bob, "CreateKey", request, idempotency_key=KEY)


async def test_of_requests_at_the_same_time_one_is_done_also_in_two_processes(
    auth: Installation, database_settings: Settings
) -> None:
    acme = await auth.add_organisation()
    search = await auth.add_project(acme)
    ada = await auth.add_person(acme, roles={"": "owner"})
    second_database = open_database(database_settings)
    other = Installation(second_database, auth.clock)
    request = pb.CreateKeyRequest(name="one", project_id=search)
    try:
        answers = await asyncio.gather(
            *(one.call(ada, "CreateKey", request, idempotency_key=KEY) for one in (auth, other) * 4)
        )
        rotation = pb.RotateKeyRequest(id=answers[0].key.id, overlap_s=60)
        rotated = await asyncio.gather(
            *(one.call(ada, "RotateKey", rotation, idempotency_key="r") for one in (auth, other) * 4)
        )
    finally:
        await other.close()
        await second_database.close()
    assert len({answer.secret for answer in answers}) == len({answer.secret for answer in rotated}) == 1
    assert len(await auth.rows(api_keys)) == 2


async def test_old_answers_are_forgotten(auth: Installation) -> None:
    acme = await auth.add_organisation()
    search = await auth.add_project(acme)
    ada = await auth.add_person(acme, roles={"": "owner"})
    for name in ("old", "new"):
        request = pb.CreateKeyRequest(name=name, project_id=search)
        await auth.call(await auth.sign_in(ada.id, acme), "CreateKey", request, idempotency_key=name)
        auth.clock.advance(20)
    auth.clock.advance(KEEP_S - 30)
    await prune_idempotency_keys(auth.database, auth.now)
    assert [row.key for row in await auth.rows(idempotency_keys)] == ["new"]


async def test_who_may_not_do_it_any_more_is_not_told_again(auth: Installation) -> None:
    """The answer holds the secret."""
    acme = await auth.add_organisation()
    search = await auth.add_project(acme)
    ada = await auth.add_person(acme, roles={"": "owner"})
    bob = await auth.add_person(acme, roles={"": "viewer", search: "developer"})
    request = pb.CreateKeyRequest(name="one", project_id=search)
    await auth.call(bob, "CreateKey", request, idempotency_key=KEY)
    await auth.call(ada, "RemoveMember", pb.RemoveMemberRequest(user_id=bob.id, project_id=search))
    other = await auth.add_project(acme, "Other")
    await auth.call(ada, "SetMember", pb.SetMemberRequest(user_id=bob.id, project_id=other, role="developer"))
    async with refused(ErrorKind.PERMISSION_DENIED):
        await auth.call(bob, "CreateKey", request, idempotency_key=KEY)
