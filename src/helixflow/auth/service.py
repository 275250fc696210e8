"""The auth service, put together: what the control process opens, serves, runs and closes."""

import asyncio
from collections.abc import Mapping
from typing import Final

import grpc

from helixflow.auth import (
    dissolution,
    invitations,
    keys,
    members,
    organisations,
    projects,
    roles,
    service_accounts,
    user_status,
    users,
)
from helixflow.auth.audit import retention
from helixflow.auth.audit.checkpoints import Checkpoints
from helixflow.auth.audit.operations import audit_operations
from helixflow.auth.audit.refusals import Refusals
from helixflow.auth.authentication import Authentication
from helixflow.auth.bootstrap import ensure_bootstrap_key
from helixflow.auth.certificates import CertificateService
from helixflow.auth.changes import ChangeFeed, prune_changes
from helixflow.auth.chores import Chore, Chores
from helixflow.auth.common_passwords import CommonPasswords
from helixflow.auth.configuration.rules import PLAIN, Rules
from helixflow.auth.configuration.service import Found, ServingService
from helixflow.auth.dispatch import Conversation, Dispatcher, Flow, Operation
from helixflow.auth.fleet import Fleet, NoPools, Pools
from helixflow.auth.housekeeping import SessionHousekeeping
from helixflow.auth.idempotency import Idempotency, prune_idempotency_keys
from helixflow.auth.identity_service import IdentityService
from helixflow.auth.master_key import MasterKey, check_master_key, load_master_key
from helixflow.auth.metering import MeteringService
from helixflow.auth.organisations import ensure_defaults
from helixflow.auth.password_rules import PasswordRules
from helixflow.auth.passwords import Passwords
from helixflow.auth.sealing import Sealer
from helixflow.auth.session_service import session_operations, signing_key_operations
from helixflow.auth.signing_key_rotation import SigningKeyRotation
from helixflow.auth.signing_keys import SigningKeys
from helixflow.auth.tokens import AccessTokens
from helixflow.auth.unit import Units
from helixflow.core.clock import Clock, SystemClock
from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.pki.issuing import Issuance
from helixflow.rpc.generated.auth_v1 import (
    admin_pb2,
    certificates_pb2,
    certificates_pb2_grpc,
    configuration_pb2,
    configuration_pb2_grpc,
    fleet_pb2,
    identity_pb2,
    identity_pb2_grpc,
    metering_pb2,
    metering_pb2_grpc,
    sessions_pb2,
    usage_pb2,
)
from helixflow.settings.tree import Settings
from helixflow.storage.engine import Database, open_database
from helixflow.storage.upgrade import upgrade

_ADMIN: Final = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
_SESSIONS: Final = sessions_pb2.DESCRIPTOR.services_by_name["SessionService"]
_IDENTITY: Final = identity_pb2.DESCRIPTOR.services_by_name["IdentityService"]
_USAGE: Final = usage_pb2.DESCRIPTOR.services_by_name["UsageService"]
_FLEET: Final = fleet_pb2.DESCRIPTOR.services_by_name["FleetService"]
_CONFIGURATION: Final = configuration_pb2.DESCRIPTOR.services_by_name["ConfigurationService"]
_SERVING: Final = configuration_pb2.DESCRIPTOR.services_by_name["ServingService"]
_CERTIFICATES: Final = certificates_pb2.DESCRIPTOR.services_by_name["CertificateService"]
_METERING: Final = metering_pb2.DESCRIPTOR.services_by_name["MeteringService"]


class AuthServices:
    """All services of `helixflow.auth.v1` over one database.

    `register` it, `run` it for as long as it serves, and `close` it before the server stops. Times come from `clock`.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        master_key: MasterKey,
        clock: Clock,
        pools: Pools,
        rules: Rules = PLAIN,
    ) -> None:
        sealer = Sealer(master_key.key)
        self._database = database
        self._feed = ChangeFeed(database, clock)
        self.units = Units(database, clock, self._feed)
        self._passwords = Passwords(PasswordRules(settings.auth.password_min_length, CommonPasswords()), clock)
        signing_keys = self._signing_keys = SigningKeys(database, sealer, clock)
        self._rotation = SigningKeyRotation(self.units, signing_keys, sealer)
        tokens = AccessTokens(signing_keys, clock, issuer=settings.auth.issuer, audience=settings.auth.audience)
        checkpoints = Checkpoints(database, sealer)
        self._refusals = Refusals(database, clock)
        self._dispatcher = Dispatcher(
            self.units, Authentication(tokens.read, clock), Idempotency(sealer), self._refusals
        )
        token_life_s = settings.auth.invitation_hours * 3600
        admin_operations: Mapping[str, Operation | Conversation | Flow] = {
            **organisations.operations(token_life_s),
            **projects.OPERATIONS,
            **dissolution.OPERATIONS,
            **users.operations(self._passwords, token_life_s),
            **user_status.operations(token_life_s),
            **invitations.operations(token_life_s),
            **members.OPERATIONS,
            **roles.OPERATIONS,
            **service_accounts.OPERATIONS,
            **keys.OPERATIONS,
            **audit_operations(checkpoints),
            **signing_key_operations(self._rotation),
        }
        self._metering = MeteringService(settings, database, clock)
        self.serving = ServingService(
            self.units, sealer, rules, lambda serving: self._metering.prices.use_models(serving.models)
        )
        self._handlers = (
            self._dispatcher.handler(_ADMIN, admin_operations),
            self._dispatcher.handler(_SESSIONS, session_operations(self._passwords, sealer, signing_keys, tokens)),
            self._dispatcher.handler(_USAGE, self._metering.operations()),
            self._dispatcher.handler(_CONFIGURATION, self.serving.operations()),
            self._dispatcher.handler(_FLEET, Fleet(pools).operations()),
        )
        self._certificates = CertificateService(self.units, Issuance(settings, clock=clock))
        self._identity = IdentityService(database, self._feed, clock, signing_keys.public_keys, settings.auth)
        installation_days = settings.auth.installation_audit_retention_days
        session_housekeeping = SessionHousekeeping(self.units, self._rotation)
        self._chores = Chores(
            (
                Chore("checkpoints", 60, checkpoints.sign_due),
                Chore("sessions", 300, lambda _now: session_housekeeping.run_once()),
                Chore("changes", 600, lambda now: prune_changes(database, now)),
                Chore("idempotency keys", 600, lambda now: prune_idempotency_keys(database, now)),
                Chore("audit log", 3600, lambda now: retention.prune(database, now, installation_days)),
                *self._metering.chores(),
            ),
            clock,
        )
        # Set by `create_auth`.
        self.bootstrap_key = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The full names of the services, for health and reflection."""
        services = (_ADMIN, _SESSIONS, _IDENTITY, _USAGE, _METERING, _FLEET, _CONFIGURATION, _SERVING, _CERTIFICATES)
        return tuple(service.full_name for service in services)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the services to a server that has not been started."""
        server.add_generic_rpc_handlers(self._handlers)
        identity_pb2_grpc.add_IdentityServiceServicer_to_server(self._identity, server)
        metering_pb2_grpc.add_MeteringServiceServicer_to_server(self._metering, server)
        configuration_pb2_grpc.add_ServingServiceServicer_to_server(self.serving, server)
        certificates_pb2_grpc.add_CertificateServiceServicer_to_server(self._certificates, server)

    async def begin(self, found: Found) -> None:
        """What must be done before anybody calls. `found` is what this node serves. Raises `HelixError`."""
        await self._feed.begin()
        await self.serving.begin(found)
        await self._signing_keys.refresh()
        await self._metering.begin()

    async def run(self) -> None:
        """Tells the gateways of changes, records refusals, keeps signing keys and tidies up, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._feed.run(), name="changes")
            tasks.create_task(self._rotation.run(), name="signing keys")
            tasks.create_task(self._refusals.run(), name="refusals")
            tasks.create_task(self._chores.run(), name="chores")
            tasks.create_task(self._metering.thresholds.run(), name="thresholds of budgets")
            tasks.create_task(self.serving.run(), name="serving configuration")

    async def close(self) -> None:
        """Ends all watches, which else never end, waits for writes under way and closes the database. Idempotent.

        End `run` before.
        """
        self._feed.close()
        self.serving.close()
        await self._dispatcher.finish()
        await self._refusals.close()
        self._passwords.close()
        await self._database.close()


async def create_auth(
    settings: Settings,
    bootstrap_env: str | None,
    clock: Clock | None = None,
    *,
    pools: Pools | None = None,
    rules: Rules = PLAIN,
    found: Found | None = None,
) -> AuthServices:
    """Opens and upgrades the database, makes the first organisation, makes sure of the bootstrap key and settles which
    models are served.

    `bootstrap_env` is the key that the environment gives, if any; `found` is what this node serves, by default the
    models of the settings. Raises `UserError` with one line.
    """
    clock = clock if clock is not None else SystemClock()
    master_key = await asyncio.to_thread(load_master_key, settings)
    database = await asyncio.to_thread(open_database, settings)
    try:
        await upgrade(settings)
        await check_master_key(database, master_key)
        await ensure_defaults(database, int(clock.now()))
        services = AuthServices(settings, database, master_key, clock, pools or NoPools(), rules)
        services.bootstrap_key = await ensure_bootstrap_key(
            services.units, settings.bootstrap_key_file, bootstrap_env, shared=settings.database.url != "sqlite"
        )
        await services.begin(found if found is not None else Found.of(settings))
    except HelixError as exc:
        await database.close()
        raise UserError(f"{database.name}: {exc.message}", ExitCode.STORAGE) from exc
    except BaseException:
        await database.close()
        raise
    return services
