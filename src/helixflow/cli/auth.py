"""`helixflow auth`: the auth service by itself, and the keys that it signs and seals with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixflow.cli.administration import Json, administer, cell
from helixflow.cli.invocation import invocation_of
from helixflow.cli.output import print_json, print_lines
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from helixflow.launch.master_key import Replaced
    from helixflow.settings.tree import Settings

EPILOG = """Example:

$ helixflow auth

$ helixflow auth --port 50061

$ helixflow auth rotate-signing-key"""

app = typer.Typer(help="Serve accounts, keys and the admin API alone; replace the keys behind them.", epilog=EPILOG)


@app.callback(invoke_without_command=True)
def auth_command(
    context: typer.Context,
    host: Annotated[str | None, typer.Option("--host", help="Address of the gRPC listener (mutual TLS).")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Port of the gRPC listener; 0 takes a free one.")
    ] = None,
) -> None:
    """Serve the auth service (gRPC with mutual TLS) and the admin API until Ctrl-C or SIGTERM.

    `helixflow serve` contains it; alone it is for nodes without models.
    """
    if context.invoked_subcommand is not None:
        if host is not None or port is not None:
            raise UserError("--host and --port are for the service itself", ExitCode.USAGE)
        return
    invocation = invocation_of(context)
    settings = invocation.load_settings({"auth.host": host, "auth.port": port})
    from helixflow.launch.auth import serve_auth
    from helixflow.settings.client import client_environment

    serve_auth(settings, client_environment().bootstrap_api_key, invocation.config_file)


@app.command(
    "rotate-signing-key",
    epilog="Example:\n\n$ helixflow auth rotate-signing-key\n\n$ helixflow auth rotate-signing-key --revoke-others",
)
def rotate_signing_key_command(
    context: typer.Context,
    revoke_others: Annotated[
        bool,
        typer.Option(
            "--revoke-others", help="End the other keys and all access tokens now: a key may be known to others."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign access tokens with a new key. Tokens of the one before it work until they expire; nobody notices.

    With --revoke-others they end within a second, and everybody's next request asks for a refreshed token.
    """
    body = {"revoke_others": revoke_others}
    rotated = administer(context, lambda api: api.ask("POST", "/signing-keys/rotate", body))
    if as_json:
        print_json(rotated)
        return
    if revoke_others:
        print_lines(f"{rotated['kid']} signs from now on; other keys and all access tokens have ended.")
        return
    print_lines(
        f"{rotated['kid']} signs in a few seconds; tokens of other keys are accepted until "
        f"{cell(rotated['others_expire_at'])}"
    )


@app.command(
    "replace-master-key",
    epilog="Example:\n\n$ helixflow auth replace-master-key --new-key-file new.key\n\n"
    "$ helixflow auth replace-master-key --new-key-file new.key --lost",
)
def replace_master_key_command(
    context: typer.Context,
    new_key_file: Annotated[
        Path, typer.Option(metavar="FILE", help="The new key; made (mode 0600) when there is no such file.")
    ],
    lost: Annotated[
        bool, typer.Option("--lost", help="Without the present key: give up what only that one opens.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Seal private keys, second factors and remembered answers in the database with another master key.

    Stop HelixFlow first: on this node, and with PostgreSQL on every other one, too. Afterwards all nodes need the new
    key. What one run was kept from finishing, the next one with the same FILE does.

    With --lost everybody has to sign in again, with the password alone: second factors and their recovery codes are
    gone. New keys sign tokens and the audit log; its old records can still be verified.
    """
    settings = invocation_of(context).load_settings()
    from helixflow.launch.master_key import replace

    replaced = replace(settings, new_key_file, lost=lost)
    if as_json:
        shown = {"file": replaced.file, "kept": replaced.kept}
        print_json(
            {"counts": dict(replaced.counts)} | {name: str(path) if path else None for name, path in shown.items()}
        )
        return
    _show_counts(replaced, lost)
    _show_files(settings, replaced, new_key_file)


def _show_counts(replaced: "Replaced", lost: bool) -> None:
    if not replaced.counts:
        print_lines("The database is sealed with that key already.")
        return
    found = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in replaced.counts.items())
    print_lines(f"{'Given up' if lost else 'Sealed anew'}: {found}.")


def _show_files(settings: "Settings", replaced: "Replaced", new_key_file: Path) -> None:
    """Where the key is, or must be put."""
    auth = settings.auth
    if auth.master_key_env is not None:
        print_lines(f"Before the next start, on every node: set {auth.master_key_env} to what {new_key_file} holds.")
        return
    if auth.master_key_file is not None:
        place = auth.master_key_file.expanduser()
        if not place.exists() or not place.samefile(new_key_file):
            print_lines(f"Before the next start, on every node: put {new_key_file} in place of {place}.")
        return
    others = "" if settings.database.url == "sqlite" else "; other nodes need a copy of it before their next start"
    print_lines(f"The master key is in {replaced.file}{others}.")
    if replaced.kept is not None:
        print_lines(f"The one before it is kept in {replaced.kept}: backups of the database made until now need it.")
    if new_key_file.absolute() not in (replaced.file, replaced.kept) and new_key_file.exists():
        print_lines(f"{new_key_file} is a copy: keep it where backups are not, or remove it.")
