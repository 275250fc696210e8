"""Administration of pools: by operators alone, recorded, and as the pools answer."""

from helixflow.core.errors import ErrorKind
from helixflow.rpc.generated.auth_v1 import fleet_pb2 as pb
from tests.harness.auth import Installation, refused
from tests.harness.recording_pools import RecordingPools


async def test_operators_ask_pools_and_that_is_recorded(auth: Installation) -> None:
    pools = RecordingPools()
    own = Installation(auth.database, auth.clock, pools=pools)
    acme = await own.add_organisation("Acme")
    operator = await own.add_person(acme, operator=True, roles={"": "viewer"})
    assert [pool.name for pool in (await own.call(operator, "ListPools", pb.ListPoolsRequest())).pools] == ["a"]
    await own.call(operator, "LoadModel", pb.PoolDeploymentRequest(pool="a", deployment="m/x"))
    await own.call(operator, "UnloadModel", pb.PoolDeploymentRequest(pool="a", deployment="m/x"))
    await own.call(operator, "PinModel", pb.PinPoolModelRequest(pool="a", deployment="m/x", pinned=True))
    await own.call(operator, "ScaleModel", pb.ScalePoolModelRequest(pool="a", deployment="m/x", replicas=2))
    await own.call(operator, "DrainPool", pb.DrainPoolRequest(pool="a"))
    assert pools.asked == [
        ("load", "a", "m/x"),
        ("unload", "a", "m/x"),
        ("pin", "a", "m/x", True),
        ("scale", "a", "m/x", 2),
        ("drain", "a", False),
    ]
    recorded = [(row.action, row.target_kind, row.target_id, row.after) for row in await own.audited("")]
    assert recorded == [
        ("load_model", "deployment", "m/x", '{"pool":"a"}'),
        ("unload_model", "deployment", "m/x", '{"pool":"a"}'),
        ("pin_model", "deployment", "m/x", '{"pinned":true,"pool":"a"}'),
        ("scale_model", "deployment", "m/x", '{"pool":"a","replicas":2}'),
        ("drain_pool", "pool", "a", '{"draining":true}'),
    ]
    await own.close()


async def test_what_a_pool_refuses_did_not_happen(auth: Installation) -> None:
    own = Installation(auth.database, auth.clock, pools=RecordingPools())
    acme = await own.add_organisation("Acme")
    operator = await own.add_person(acme, operator=True, roles={"": "viewer"})
    owner = await own.add_person(acme, roles={"": "owner"})
    async with refused(ErrorKind.NOT_FOUND, "pool"):
        await own.call(operator, "LoadModel", pb.PoolDeploymentRequest(pool="b", deployment="m/x"))
    async with refused(ErrorKind.UNPROCESSABLE, "replicas"):
        await own.call(operator, "ScaleModel", pb.ScalePoolModelRequest(pool="a", deployment="m/x", replicas=65))
    for rpc, request in (("ListPools", pb.ListPoolsRequest()), ("DrainPool", pb.DrainPoolRequest(pool="a"))):
        async with refused(ErrorKind.PERMISSION_DENIED):
            await own.call(owner, rpc, request)
    assert [row.outcome for row in await own.audited("")] == ["denied"] * len(await own.audited(""))
    await own.close()
