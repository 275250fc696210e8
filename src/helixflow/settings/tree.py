"""Every setting, its default, its bounds and what it is for. docs/reference/settings.md is generated from here."""

import ipaddress
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, IPvAnyNetwork, field_validator, model_validator

from helixflow.settings.models import ModelSettings, check_models
from helixflow.settings.section import Amount, Port, Seconds, SecretRef, Section
from helixflow.settings.serving import PoolSettings, RoutingSettings

DEFAULT_CHAT_MODEL = "smollm2-135m-instruct"
DEFAULT_EMBEDDING_MODEL = "all-minilm-l6-v2"


class CorsSettings(Section):
    """Cross-origin access from browsers. Off while `origins` is empty."""

    origins: tuple[str, ...] = Field((), description='Origins that browsers may call from; `["*"]` allows any.')
    max_age_s: int = Field(600, ge=0, description="How long a browser may keep a preflight answer, seconds.")


class GatewaySettings(Section):
    """The data plane: where the API listens and what bounds a request."""

    host: str = Field("127.0.0.1", description="Address of the plain HTTP listener; must be loopback.")
    http_port: Port = Field(8080, description="Port of the plain HTTP listener; 0 takes a free one.")
    https_host: str = Field("127.0.0.1", description="Address of the HTTPS listener; `0.0.0.0` or `::` for all.")
    https_port: Port = Field(8443, description="Port of the HTTPS listener (TLS 1.3 only); 0 takes a free one.")
    tls_names: tuple[str, ...] = Field(
        (), description="DNS names and addresses in our own HTTPS certificate, beside this host's name and loopback."
    )
    certificate_file: Path | None = Field(
        None, description="HTTPS certificate with its chain (PEM) instead of our own; reloaded when it changes."
    )
    key_file: Path | None = Field(None, description="Private key (PEM) of `certificate_file`.")
    trusted_proxies: tuple[IPvAnyNetwork, ...] = Field(
        (), description="Networks of proxies whose `X-Forwarded-For` tells the client's address."
    )
    workers: int = Field(1, ge=1, le=64, description="Gateway processes; more than one needs `redis`.")
    max_body_bytes: int = Field(20 * 2**20, ge=1024, description="Largest request body, after decompression.")
    max_header_bytes: int = Field(64 * 1024, ge=4096, description="Largest request head: request line and headers.")
    header_timeout_s: Seconds = Field(10, description="A request head must be complete within this time.")
    body_timeout_s: Seconds = Field(60, description="A request body must be complete within this time.")
    keep_alive_s: Seconds = Field(75, description="An idle client connection is closed after this time.")
    stall_timeout_s: Seconds = Field(60, description="A client that reads nothing for this long is cut off.")
    request_timeout_s: Seconds = Field(600, description="Longest time for one request, queueing included.")
    load_wait_s: Seconds = Field(60, description="How long a request waits for its model to load before 503.")
    drain_timeout_s: Seconds = Field(30, description="On shutdown, how long running requests may go on.")
    key_cache_size: int = Field(100_000, ge=100, description="Resolved API keys kept in memory.")
    key_cache_ttl_s: Seconds = Field(60, description="A cached key is looked up again after this time.")
    key_cache_grace_s: Seconds = Field(300, description="How long a cached key works while auth cannot be reached.")
    token_cache_size: int = Field(10_000, ge=100, description="Verified access tokens kept in memory.")
    sign_ins_per_minute: int = Field(
        600, ge=6, description="Requests to `/api/v1/auth` from one address; more get 429 `too_many_attempts`."
    )
    cors: CorsSettings = CorsSettings()

    @field_validator("host")
    @classmethod
    def _loopback_only(cls, host: str) -> str:
        if host == "localhost":
            return host
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ValueError("plain HTTP listens on a loopback address only (127.0.0.1 or ::1)")
        return host

    @model_validator(mode="after")
    def _certificate_with_key(self) -> "GatewaySettings":
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file are given together")
        return self


class AuthSettings(Section):
    """The auth service: where it listens, and what tokens say."""

    host: str = Field("127.0.0.1", description="Address of the gRPC listener (mutual TLS).")
    port: Port = Field(50051, description="Port of the gRPC listener; 0 takes a free one.")
    issuer: str = Field("helixflow", min_length=1, max_length=200, description="`iss` of access tokens.")
    audience: str = Field("helixflow", min_length=1, max_length=200, description="`aud` of access tokens.")
    master_key_file: Path | None = Field(
        None,
        description="File of the key that seals private keys and second factors in the database; "
        "default: `data_dir/master.key`, made at the first start.",
    )
    master_key_env: str | None = Field(None, description="Environment variable that holds that key.")
    password_min_length: int = Field(12, ge=8, le=128, description="Fewest characters of a password.")
    invitation_hours: int = Field(72, ge=1, le=720, description="How long invitations and reset tokens work.")
    installation_audit_retention_days: int = Field(
        365,
        ge=0,
        le=3650,
        description="Days that the installation's own audit log is kept: 30 or more, or 0 for ever. "
        "Organisations have each their own `audit_retention_days`.",
    )

    @field_validator("installation_audit_retention_days")
    @classmethod
    def _month_or_more(cls, days: int) -> int:
        if 0 < days < 30:
            raise ValueError("audit records are kept for 30 days or more, or for ever (0)")
        return days

    @model_validator(mode="after")
    def _one_master_key(self) -> "AuthSettings":
        if self.master_key_file is not None and self.master_key_env is not None:
            raise ValueError("give master_key_file or master_key_env, not both")
        return self


class PkiSettings(Section):
    """Our own certificate authority, and the certificates of services."""

    trust_domain: str = Field(
        "helixflow.internal",
        pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$",
        description="Trust domain in the names of services, `spiffe://<trust domain>/<service>`.",
    )
    certificate_hours: float = Field(
        24, gt=0, le=24 * 90, description="Life of a service's certificate; renewed at two thirds of it."
    )


class DatabaseSettings(Section):
    """Where accounts and keys are kept."""

    url: str = Field(
        "sqlite",
        description="`sqlite` for a file under `data_dir`, or `postgresql://user@host:port/name?sslmode=…`.",
        pattern=r"^(sqlite|postgres(ql)?://\S+)$",
    )
    password_file: Path | None = Field(None, description="File that holds the password for PostgreSQL.")
    password_env: str | None = Field(None, description="Environment variable that holds that password.")
    pool_size: int = Field(10, ge=2, le=200, description="Most connections to PostgreSQL at the same time.")

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str) -> str:
        if urlsplit(url).password is not None:
            raise ValueError("the password does not belong in the URL: use password_file or password_env")
        return url

    @model_validator(mode="after")
    def _one_password(self) -> "DatabaseSettings":
        if self.password_file is not None and self.password_env is not None:
            raise ValueError("give password_file or password_env, not both")
        return self

    @property
    def password(self) -> SecretRef | None:
        if self.password_file is None and self.password_env is None:
            return None
        return SecretRef(file=self.password_file, env=self.password_env)


class MeteringSettings(Section):
    """Limits, budgets, and the journal that loses nothing."""

    enabled: bool = Field(True, description="Off: no limits, no budgets, no record of what was used.")
    journal_dir: Path | None = Field(
        None, description="Where gateways journal what they do: on a disk of this machine; default `data_dir/journal`."
    )
    durability: Literal["os", "disk"] = Field(
        "os",
        description="When a record counts as written: given to the operating system (survives the end of a process), "
        "or on the disk (survives a power cut; slower).",
    )
    segment_bytes: int = Field(
        8 * 2**20, ge=2**20, le=2**30, description="Size of a journal file, taken from the disk beforehand."
    )
    sync_interval_s: Seconds = Field(1, description="With `os`: how often the journal is synced to disk anyway.")
    progress_interval_s: Seconds = Field(1, description="How often the progress of a running request is journalled.")
    ship_interval_s: Seconds = Field(0.25, description="How often finished requests are shipped to the ledger.")
    retention_days: int = Field(0, ge=0, le=3650, description="Days that single requests are kept; 0: for ever.")
    policy_cache_size: int = Field(100_000, ge=100, description="Callers whose limits are kept in memory.")
    expected_completion_tokens: int = Field(
        256, ge=0, description="Charged to token limits until it is known, for requests without `max_tokens`."
    )
    media_tokens: int = Field(
        8192, ge=0, description="Most prompt tokens of one image, sound or file; budgets reserve so much for each."
    )
    unpriced_input: Amount = Field(
        "10", description="Dollars for a million prompt tokens of a provider's model that has no known price."
    )
    unpriced_output: Amount = Field("30", description="The same for completion tokens.")


class RedisSettings(Section):
    """Redis or Valkey, where several gateways share limits and budgets. Not used while `url` is empty."""

    url: str = Field(
        "",
        pattern=r"^(rediss?://[^\s@]*|unix://\S+)?$",
        description="`redis://host:port/database`, `rediss://…` for TLS, or `unix:///path`. No cluster.",
    )
    user: str = Field("", description="User name, where the server has users.")
    password_file: Path | None = Field(None, description="File that holds the password.")
    password_env: str | None = Field(None, description="Environment variable that holds the password.")
    ca_file: Path | None = Field(None, description="CA certificates to trust instead of the system's.")
    timeout_s: Seconds = Field(1, description="No answer for so long: Redis is away, the fall-back begins.")
    lease_per_mille: int = Field(
        10, ge=0, le=100, description="Thousandths of each budget that a gateway holds for the time without Redis."
    )
    gateways: int = Field(
        1, ge=1, le=10_000, description="How many gateways share it: each enforces its share of limits without Redis."
    )

    @model_validator(mode="after")
    def _one_password(self) -> "RedisSettings":
        if self.password_file is not None and self.password_env is not None:
            raise ValueError("give password_file or password_env, not both")
        return self

    @property
    def password(self) -> SecretRef | None:
        if self.password_file is None and self.password_env is None:
            return None
        return SecretRef(file=self.password_file, env=self.password_env)


class LogSettings(Section):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level written.")
    format: Literal["auto", "text", "json"] = Field("auto", description="`auto`: text on a terminal, JSON otherwise.")


class Settings(Section):
    """The whole tree."""

    data_dir: Path = Field(Path("~/.local/share/helixflow"), description="Models, database, keys and sockets.")
    gateway: GatewaySettings = GatewaySettings()
    auth: AuthSettings = AuthSettings()
    pki: PkiSettings = PkiSettings()
    database: DatabaseSettings = DatabaseSettings()
    metering: MeteringSettings = MeteringSettings()
    redis: RedisSettings = RedisSettings()
    routing: RoutingSettings = RoutingSettings()
    pool: PoolSettings = PoolSettings()
    log: LogSettings = LogSettings()
    models: tuple[ModelSettings, ...] = Field(
        (ModelSettings(name=DEFAULT_CHAT_MODEL), ModelSettings(name=DEFAULT_EMBEDDING_MODEL)),
        description="The models served; by default one for chat and one for embeddings.",
    )

    @field_validator("data_dir")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  (resolve() would follow symlinks)

    @field_validator("models")
    @classmethod
    def _consistent(cls, models: tuple[ModelSettings, ...]) -> tuple[ModelSettings, ...]:
        check_models(models)
        return models

    @model_validator(mode="after")
    def _priced_routes(self) -> "Settings":
        for model in self.models:
            if not self.metering.enabled and (model.max_cost is not None or model.balance == "cost"):
                raise ValueError(f"the model {model.name!r} is routed by cost: that needs metering.enabled")
        return self

    @model_validator(mode="after")
    def _shared_limits(self) -> "Settings":
        if self.gateway.workers > 1 and self.metering.enabled and not self.redis.url:
            raise ValueError("gateway.workers above 1 needs redis.url: limits and budgets must hold over all of them")
        if self.redis.url and self.redis.gateways < self.gateway.workers:
            raise ValueError("redis.gateways counts all gateways, these workers too: it is at least gateway.workers")
        return self

    @property
    def journal_dir(self) -> Path:
        """The journals of this machine's gateways; mode 0700."""
        return self.metering.journal_dir or self.data_dir / "journal"

    @property
    def run_dir(self) -> Path:
        """Sockets of running services; mode 0700."""
        return self.data_dir / "run"

    @property
    def pki_dir(self) -> Path:
        """The certificate authority and the certificates of services; mode 0700."""
        return self.data_dir / "pki"

    @property
    def bootstrap_key_file(self) -> Path:
        """The first API key of the installation; mode 0600."""
        return self.data_dir / "bootstrap.key"

    @property
    def models_dir(self) -> Path:
        return self.data_dir / "models"
