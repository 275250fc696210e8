"""Pools: the nodes that run models."""

from typing import Annotated

from fastapi import Path
from pydantic import Field

from helixflow.console.endpoint import FLEET, endpoint
from helixflow.console.fields import OptionalMoment, OptionalText, Shape, Texts
from helixflow.console.models import Given, Shown
from helixflow.rpc.generated.auth_v1 import fleet_pb2

_NAME = ["gpu-1"]
_DEPLOYMENT = ["smollm2-135m-instruct/llama_cpp-0"]
Name = Annotated[
    str,
    Path(description="The pool.", examples=_NAME, min_length=1, max_length=63),
    Shape(r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$", "must be the name of a pool"),
]
Deployment = Annotated[
    str,
    Field(min_length=3, max_length=300, examples=_DEPLOYMENT),
    Shape(r"^[^\x00-\x20]+/[^\x00-\x20/]+$", "must be the name of a deployment, such as model/llama_cpp-0"),
]


class Device(Shown):
    """A GPU, or a MIG instance of one."""

    uuid: str = Field(description="Its UUID.", examples=["GPU-5d1b3b1c-0000-0000-0000-000000000000"])
    name: str = Field(description="What it is.", examples=["NVIDIA H100 80GB HBM3"])
    memory_bytes: int = Field(description="Its memory.", examples=[85_520_809_984])
    used_bytes: int = Field(description="What of it is taken, by whomever.", examples=[62_277_025_792])
    utilisation_percent: int = Field(description="How busy it is.", examples=[97])
    replicas: Texts = Field(description="Replicas that it is assigned to.", examples=[["llama-3/vllm-0#0-1a2b3c"]])


class PoolDeployment(Shown):
    """A deployment on a pool."""

    deployment: str = Field(description="Its name.", examples=_DEPLOYMENT)
    state: str = Field(
        description="`idle`, `pulling`, `loading`, `ready`, `backoff`, `failed` or `unloading`.", examples=["ready"]
    )
    detail: OptionalText = Field(description="Why it is so, or how far.", examples=["downloading 42 %"])
    restarts: int = Field(description="Engine processes started again after a crash.", examples=[0])
    pinned: bool = Field(description="Never unloaded to make room.", examples=[False])
    wanted_replicas: int = Field(description="How many it is to have while it is loaded.", examples=[1])
    replicas: int = Field(description="How many serve now.", examples=[1])
    slots: int = Field(description="Generations at the same time, over its replicas.", examples=[4])
    busy: int = Field(description="Of these, in use now.", examples=[2])
    ram_bytes: int = Field(description="RAM that one replica takes.", examples=[340_000_000])
    gpu_bytes: int = Field(description="GPU memory that one replica takes.", examples=[0])
    measured: bool = Field(description="Measured; else planned, as it was never loaded.", examples=[True])
    last_used_at: OptionalMoment = Field(description="When it was last used; null: never.")


class Pool(Shown):
    """The engines of one node."""

    name: str = Field(description="Its name.", examples=_NAME)
    address: OptionalText = Field(description="Where it listens; null: on this node.", examples=["10.0.0.7:50052"])
    reachable: bool = Field(description="Whether it answered; else the rest is empty.", examples=[True])
    draining: bool = Field(description="Whether it takes nothing new.", examples=[False])
    ram_limit_bytes: int = Field(description="RAM that engines may take.", examples=[109_521_666_048])
    ram_used_bytes: int = Field(description="RAM that they take.", examples=[340_000_000])
    cores: int = Field(description="Processors.", examples=[16])
    devices: list[Device] = Field(description="GPUs.")
    deployments: list[PoolDeployment] = Field(description="What it serves.")


class PoolList(Shown):
    """All pools."""

    pools: list[Pool]


class WhichDeployment(Given):
    """A deployment."""

    deployment: Deployment = Field(description="Its name.")


class Pin(WhichDeployment):
    """Whether it may be unloaded to make room."""

    pinned: bool = Field(True, description="True: it may not.")


class Scale(WhichDeployment):
    """How many replicas it is to have."""

    replicas: Annotated[int, Field(ge=0, le=64, examples=[2])] = Field(description="0: none, not on request either.")


class Drain(Given):
    """Whether a pool takes nothing new."""

    draining: bool = Field(True, description="False: everything as before.")


@endpoint("GET", "/pools", FLEET["ListPools"], PoolList)
def list_pools() -> fleet_pb2.ListPoolsRequest:
    """All pools that are known now, with what they serve and what memory is taken."""
    return fleet_pb2.ListPoolsRequest()


@endpoint("POST", "/pools/{name}/load", FLEET["LoadModel"])
def load_model(name: Name, body: WhichDeployment) -> fleet_pb2.PoolDeploymentRequest:
    """Starts loading a deployment, and waits a few seconds for it. 503 with the numbers when it cannot fit."""
    return fleet_pb2.PoolDeploymentRequest(pool=name, **body.given())


@endpoint("POST", "/pools/{name}/unload", FLEET["UnloadModel"])
def unload_model(name: Name, body: WhichDeployment) -> fleet_pb2.PoolDeploymentRequest:
    """Ends the engines of a deployment once their running generations have ended; waits a few seconds for that."""
    return fleet_pb2.PoolDeploymentRequest(pool=name, **body.given())


@endpoint("POST", "/pools/{name}/pin", FLEET["PinModel"])
def pin_model(name: Name, body: Pin) -> fleet_pb2.PinPoolModelRequest:
    """Says whether a deployment may be unloaded to make room for another one."""
    return fleet_pb2.PinPoolModelRequest(pool=name, **body.given())


@endpoint("POST", "/pools/{name}/scale", FLEET["ScaleModel"])
def scale_model(name: Name, body: Scale) -> fleet_pb2.ScalePoolModelRequest:
    """Says how many replicas a deployment is to have."""
    return fleet_pb2.ScalePoolModelRequest(pool=name, **body.given())


@endpoint("POST", "/pools/{name}/drain", FLEET["DrainPool"])
def drain_pool(name: Name, body: Drain) -> fleet_pb2.DrainPoolRequest:
    """Says whether a pool takes nothing new; what runs goes on."""
    return fleet_pb2.DrainPoolRequest(pool=name, resume=not body.draining)


ENDPOINTS = (list_pools, load_model, unload_model, pin_model, scale_model, drain_pool)
