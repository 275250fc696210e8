"""All endpoints, by the tag under which the OpenAPI document shows them."""

from dataclasses import dataclass
from typing import Final

from helixflow.console.endpoint import Endpoint
from helixflow.console.resources import (
    account,
    audit,
    budgets,
    configuration,
    invitations,
    journals,
    keys,
    limits,
    members,
    organisations,
    pools,
    prices,
    projects,
    requests,
    roles,
    service_accounts,
    sessions,
    signing_keys,
    usage,
    users,
)


@dataclass(frozen=True, slots=True)
class Tag:
    """A group of endpoints."""

    name: str
    description: str
    endpoints: tuple[Endpoint, ...]


TAGS: Final = (
    Tag("Signing in", "Sessions and tokens.", sessions.ENDPOINTS),
    Tag("Own account", "What callers do with their own account.", account.ENDPOINTS),
    Tag("Organisations", "Organisations of the installation.", organisations.ENDPOINTS),
    Tag("Projects", "Projects of the organisation.", projects.ENDPOINTS),
    Tag("Users", "Accounts, as the organisation sees them.", users.ENDPOINTS),
    Tag("Invitations", "What makes members of people.", invitations.ENDPOINTS),
    Tag("Members", "Which role a user has where.", members.ENDPOINTS),
    Tag("Roles", "Built-in roles and the organisation's own.", roles.ENDPOINTS),
    Tag("Service accounts", "Identities of programs.", service_accounts.ENDPOINTS),
    Tag("API keys", "Keys for the API.", keys.ENDPOINTS),
    Tag("Usage", "What was used and what it cost.", usage.ENDPOINTS),
    Tag("Requests", "Single requests, and why they went as they went.", requests.ENDPOINTS),
    Tag("Limits", "How many requests and tokens.", limits.ENDPOINTS),
    Tag("Budgets", "How much money, how many tokens.", budgets.ENDPOINTS),
    Tag("Journals", "What gateways have recorded and the ledger waits for.", journals.ENDPOINTS),
    Tag("Prices", "What models cost.", prices.ENDPOINTS),
    Tag("Pools", "The nodes that run models.", pools.ENDPOINTS),
    Tag("Configuration", "Which models are served by what.", configuration.ENDPOINTS),
    Tag("Audit log", "Who did what.", audit.ENDPOINTS),
    Tag("Signing keys", "The installation's keys for access tokens.", signing_keys.ENDPOINTS),
)
