"""What the settings refer to, for `helixflow config check`: files, variables, names, addresses.

Nothing is connected to and nothing is made. Imports are in the functions: most installations need few of them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from helixflow.core.errors import UserError

if TYPE_CHECKING:
    from helixflow.settings.tree import DatabaseSettings, GatewaySettings, Settings

Location = tuple[str | int, ...]
# Where in the settings, and what is wrong: one line, never a secret.
Problem = tuple[Location, str]


def find_problems(settings: "Settings") -> Iterator[Problem]:
    """What a start would stumble over although the settings are well-formed."""
    yield from _in_data_dir(settings)
    yield from _in_gateway(settings.gateway)
    yield from _in_auth(settings)
    yield from _in_database(settings.database)
    yield from _in_models(settings)


def _in_data_dir(settings: "Settings") -> Iterator[Problem]:
    from helixflow.rpc.sockets import socket_path

    try:
        socket_path(settings.run_dir, "control")
    except UserError as exc:
        yield ("data_dir",), exc.message


def _in_gateway(gateway: "GatewaySettings") -> Iterator[Problem]:
    for index, name in enumerate(gateway.tls_names):
        from helixflow.pki.names import parse_names

        try:
            parse_names([name])
        except UserError as exc:
            yield ("gateway", "tls_names", index), exc.message
    for index, network in enumerate(gateway.trusted_proxies):
        if (reason := _why_no_proxy(network)) is not None:
            yield ("gateway", "trusted_proxies", index), reason
    if gateway.certificate_file is not None and gateway.key_file is not None:
        from helixflow.pki.contexts import ServerContext

        try:
            ServerContext(gateway.certificate_file, gateway.key_file)
        except UserError as exc:
            about_key = exc.message.startswith(f"{gateway.key_file.expanduser()}: ")
            yield ("gateway", "key_file" if about_key else "certificate_file"), exc.message


def _why_no_proxy(network: Any) -> str | None:
    if network.prefixlen == 0:
        return f"{network} trusts everybody: any client could say where it comes from; name the proxies' own network"
    if network.version == 6 and (mapped := network.network_address.ipv4_mapped) is not None:
        # Addresses of clients are told in the plain form.
        return f"{network} matches nothing; write {mapped}/{max(network.prefixlen - 96, 0)}"
    return None


def _in_auth(settings: "Settings") -> Iterator[Problem]:
    if settings.auth.master_key_env is None and settings.auth.master_key_file is None:
        return  # ours to make
    from helixflow.auth.master_key import find_master_key

    name = "master_key_env" if settings.auth.master_key_env is not None else "master_key_file"
    try:
        find_master_key(settings)
    except UserError as exc:
        yield ("auth", name), exc.message.removeprefix(f"auth.{name}: ")


def _in_database(database: "DatabaseSettings") -> Iterator[Problem]:
    if database.url != "sqlite":
        from helixflow.storage.address import Address

        try:
            Address.parse(database.url).tls()
        except UserError as exc:
            yield ("database", "url"), exc.message.removeprefix("database.url: ")
    if database.password is not None:
        try:
            database.password.read()
        except ValueError as exc:
            yield ("database", "password_file" if database.password_file is not None else "password_env"), str(exc)


def _in_models(settings: "Settings") -> Iterator[Problem]:
    from helixflow.launch.serving_rules import find_model_problems
    from helixflow.pool.catalogue import Catalogue

    for problem in find_model_problems(settings, settings.models, Catalogue.load()):
        yield problem.location, problem.reason
