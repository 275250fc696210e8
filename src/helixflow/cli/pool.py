"""`helixflow pool`: hands over to `launch`."""

from typing import Annotated, Literal

import typer

from helixflow.cli.invocation import invocation_of

EPILOG = """Example:

$ helixflow pool --control 10.0.0.1:50051 --host 10.0.0.2

$ helixflow --config helixflow.toml pool --log-format json"""


def pool_command(
    context: typer.Context,
    control: Annotated[
        str | None, typer.Option("--control", metavar="HOST:PORT", help="The auth service that it registers with.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address of both listeners (mutual TLS).")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Port of the gRPC listener; 0 takes a free one.")
    ] = None,
    data_port: Annotated[
        int | None,
        typer.Option("--data-port", min=0, max=65535, help="Port where gateways reach engines; 0 takes a free one."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The node's name in the fleet; default: the host's.")
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option("--log-level", help="Least severe log level written."),
    ] = None,
    log_format: Annotated[
        Literal["auto", "text", "json"] | None,
        typer.Option("--log-format", help="auto: text on a terminal, JSON otherwise."),
    ] = None,
) -> None:
    """Run the engines of this node for gateways elsewhere, until Ctrl-C or SIGTERM.

    `helixflow serve` contains a pool; alone it is for further nodes of a fleet. It needs a certificate of the fleet's
    authority in data_dir/pki: helixflow pki issue pool.
    """
    settings = invocation_of(context).load_settings(
        {
            "pool.control": control,
            "pool.host": host,
            "pool.port": port,
            "pool.data_port": data_port,
            "pool.name": name,
            "log.level": log_level,
            "log.format": log_format,
        }
    )
    from helixflow.launch.pool_start import serve_pool

    serve_pool(settings)
