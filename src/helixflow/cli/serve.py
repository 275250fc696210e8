"""`helixflow serve`: hands over to `launch`."""

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from helixflow.cli.invocation import invocation_of

if TYPE_CHECKING:
    from helixflow.settings.tree import Settings

EPILOG = """Example:

$ helixflow serve

$ helixflow serve --welcome --http-port 9000

$ helixflow --config helixflow.toml serve --log-format json"""


def serve_command(
    context: typer.Context,
    http_port: Annotated[
        int | None, typer.Option("--http-port", min=0, max=65535, help="Port of the API; 0 takes a free one.")
    ] = None,
    https_port: Annotated[
        int | None, typer.Option("--https-port", min=0, max=65535, help="Its port for HTTPS; 0 takes a free one.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Loopback address that the API listens on.")] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option("--log-level", help="Least severe log level written."),
    ] = None,
    log_format: Annotated[
        Literal["auto", "text", "json"] | None,
        typer.Option("--log-format", help="auto: text on a terminal, JSON otherwise."),
    ] = None,
    welcome: Annotated[
        bool, typer.Option("--welcome/--no-welcome", help="Ask the model a question and show how to connect.")
    ] = False,
) -> None:
    """Serve the configured models until Ctrl-C or SIGTERM.

    Missing models are fetched first. Running requests are finished (within a bound) before it ends; a second Ctrl-C
    ends it at once.
    """
    invocation = invocation_of(context)
    settings = invocation.load_settings(
        {
            "gateway.http_port": http_port,
            "gateway.https_port": https_port,
            "gateway.host": host,
            "log.level": log_level,
            "log.format": log_format,
        }
    )
    from helixflow.launch.serve import serve

    welcome_argv = None
    if welcome:
        from helixflow.launch.serving_start import decide_serving
        from helixflow.pool.catalogue import Catalogue

        # What is served may have been applied since the file was written.
        in_force, _ = decide_serving(settings, invocation.config_file, Catalogue.load())
        welcome_argv = welcome_arguments(in_force)

    serve(settings, config=invocation.config_file, welcome_argv=welcome_argv)


def welcome_arguments(settings: "Settings") -> list[str]:
    """The command that greets once everything serves; `{base_url}` and `{https_url}` are filled in by `launch`."""
    from helixflow.cli.served import served_models

    arguments = [sys.executable, "-P", "-m", "helixflow.cli.welcome", "--base-url", "{base_url}/v1"]
    arguments += ["--https-url", "{https_url}/v1"]
    arguments += ["--key-file", str(settings.bootstrap_key_file)]
    models = served_models(settings)
    chat = sorted((model for model in models if model.task == "chat"), key=lambda model: model.warmth)
    embeddings = [model for model in models if model.task == "embeddings"]
    if chat:
        arguments += ["--chat-model", chat[0].name]
    if embeddings:
        arguments += ["--embedding-model", embeddings[0].name]
    return arguments
