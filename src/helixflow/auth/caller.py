"""Who calls the auth service, from where, and what that caller may do now."""

from dataclasses import dataclass, field
from enum import Enum

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.core.permissions import Grants
from helixflow.rpc.access import Access, Level


class CallerKind(Enum):
    """The value is what the audit log says."""

    ACCOUNT = "account"
    KEY = "key"
    ANONYMOUS = "anonymous"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a call comes from, as the admin API says. Texts are bounded; empty when not known."""

    address: str = ""
    request_id: str = ""
    software: str = ""


@dataclass(frozen=True, slots=True)
class Caller:
    """An identity with the permissions that it has at this moment, in one organisation.

    `id` is the account's; for an API key the key's own, whose `owner_id` is the account or service account that it acts
    for, if any. `project_id` is that of the credential, '' for none. An `operator` may do what concerns the
    installation.
    """

    kind: CallerKind
    id: str = ""
    name: str = ""
    organisation_id: str = ""
    project_id: str = ""
    owner_id: str = ""
    session_id: str = ""
    roles: tuple[str, ...] = ()
    grants: Grants = field(default_factory=Grants)
    operator: bool = False
    source: Source = field(default_factory=Source)

    @property
    def subject_id(self) -> str:
        """Who answers for what is done: the owner of a key, otherwise the caller itself."""
        return self.owner_id or self.id

    def check(self, access: Access) -> None:
        """Whether the declaration lets this caller in at all. At Level.PROJECT the operation must go on to check the
        project itself (`Unit.authorise`). Raises `HelixError` INVALID_TOKEN or PERMISSION_DENIED.
        """
        match access.level:
            case Level.PUBLIC:
                return
            case _ if self.kind is CallerKind.ANONYMOUS:
                raise HelixError(ErrorKind.INVALID_TOKEN, "Sign in, or send an API key as 'Authorization: Bearer …'.")
            case Level.SELF:
                return
            case Level.INSTALLATION if self.operator:
                return
            case Level.ORGANISATION if access.permission and self.grants.allows(access.permission):
                return
            case Level.PROJECT if access.permission and self.grants.allows_somewhere(access.permission):
                return
        raise denied(access)


class CallerRefused(HelixError):
    """PERMISSION_DENIED for a caller who is known, whatever the call is."""

    def __init__(self, caller: Caller, message: str) -> None:
        super().__init__(ErrorKind.PERMISSION_DENIED, message)
        self.caller = caller


def denied(access: Access) -> HelixError:
    """The refusal; names the permission that is missing."""
    needed = f"the permission {access.permission.value}" if access.permission is not None else "another caller"
    return HelixError(ErrorKind.PERMISSION_DENIED, f"Not permitted: this needs {needed}.")
