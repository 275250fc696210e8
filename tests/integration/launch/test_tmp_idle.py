import asyncio, time
from tests.integration.launch.test_launch_residency import *
async def test_idle(launcher_with_model, chat_model, pki):
    async with pool_of(launcher_with_model, model("a", chat_model.source)) as pool:
        await pool.supervisor.load_and_wait(A)
        await asyncio.sleep(1)
        c=time.process_time(); await asyncio.sleep(15)
        print("alone %.2f%%"%(100*(time.process_time()-c)/15))
        async with served(pool, launcher_with_model, pki) as stub:
            watch = stub.WatchReplicas(pool_pb2.WatchReplicasRequest())
            n=0
            async def rd():
                nonlocal n
                while True:
                    await watch.read(); n+=1
            t=asyncio.create_task(rd())
            await asyncio.sleep(1)
            c=time.process_time(); await asyncio.sleep(15)
            print("watched %.2f%%"%(100*(time.process_time()-c)/15), n)
            t.cancel()
