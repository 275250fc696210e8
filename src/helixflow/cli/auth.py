"""`helixflow auth`: the auth service by itself, and its signing key."""

from typing import Annotated

import typer

from helixflow.cli.invocation import invocation_of

EPILOG = """Example:

$ helixflow auth

$ helixflow auth --port 50061

$ helixflow auth rotate-signing-key"""

app = typer.Typer(help="Serve accounts, keys and the admin API alone; rotate the signing key.", epilog=EPILOG)


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
        return
    settings = invocation_of(context).load_settings({"auth.host": host, "auth.port": port})
    from helixflow.launch.auth import serve_auth
    from helixflow.settings.client import client_environment

    serve_auth(settings, client_environment().bootstrap_api_key)
