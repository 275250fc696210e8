"""Settings of the rooms that serve models: routing and pools."""

from pathlib import Path

from pydantic import Field

from helixflow.settings.section import Label, Port, Seconds, Section


class RoutingSettings(Section):
    """How requests find deployments and replicas, and what is done when one fails."""

    ejection_failures: int = Field(5, ge=1, description="Failures in a row that take a deployment out of its tier.")
    ejection_s: Seconds = Field(1, description="For how long at first; doubled each time up to `ejection_max_s`.")
    ejection_max_s: Seconds = Field(30, description="Longest ejection; then one request decides.")
    max_ejected_percent: int = Field(
        50, ge=0, le=100, description="Part of a tier that may be ejected for being slow or failing at times."
    )
    retry_percent: int = Field(20, ge=0, le=100, description="Retries and hedges, as a part of all requests.")
    retry_reserve: int = Field(10, ge=0, description="Retries that are allowed whatever their part is.")
    prefix_block_bytes: int = Field(256, ge=64, le=4096, description="Grain in which beginnings of prompts compare.")
    prefix_entries: int = Field(100_000, ge=0, le=10_000_000, description="Beginnings remembered in each gateway.")
    load_guard: float = Field(
        1.5,
        ge=1,
        le=100,
        description="A replica is preferred for a known beginning while its load is not this many "
        "times that of the one that would be taken otherwise.",
    )
    latency_half_life_s: Seconds = Field(10, description="How fast measured latencies are forgotten.")


class PoolSettings(Section):
    """Engines of one node: where the pool listens and what they may take."""

    name: Label | None = Field(None, description="The node's name in the fleet; default: the host's.")
    host: str = Field("127.0.0.1", description="Address of the gRPC listener (mutual TLS).")
    port: Port = Field(50052, description="Port of the gRPC listener; 0 takes a free one.")
    data_port: Port = Field(
        50062, description="Port on which gateways of other nodes reach engines (mutual TLS); 0 takes a free one."
    )
    advertised_host: str | None = Field(None, description="Name or address that others reach it by; default: `host`.")
    control: str = Field(
        "",
        pattern=r"^(\S+:[0-9]{1,5})?$",
        description="`host:port` of the auth service that this pool registers with; empty: of this node.",
    )
    memory_bytes: int = Field(0, ge=0, description="RAM that engines may take; 0: `memory_percent` of what is there.")
    memory_percent: int = Field(85, ge=1, le=100, description="Part of the RAM (or of the cgroup's) for engines.")
    gpu_memory_percent: int = Field(90, ge=1, le=100, description="Part of each GPU's memory for engines.")
    min_residence_s: float = Field(
        10, ge=0, le=86_400, description="A model that was loaded is not evicted for another one before that."
    )
    load_deadline_s: Seconds = Field(900, description="A load that takes longer has failed.")
    gpu_cleanup: bool = Field(True, description="End our own processes that are left on a GPU without their replica.")
    measurements_file: Path | None = Field(
        None, description="What models were measured to take in memory; default `data_dir/models/measured.json`."
    )
