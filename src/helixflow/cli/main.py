"""The application: wires the command groups and is the entry point. Importing it must stay cheap."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from helixflow.cli import chat, config, doctor, keys, models, serve, version
from helixflow.cli.failures import print_error, run_guarded
from helixflow.cli.invocation import Invocation
from helixflow.core.errors import ExitCode

_EPILOG = """Example:

$ helixflow serve --welcome

$ helixflow --config helixflow.toml config check

$ helixflow chat "What is the capital of France?"

Exit codes: 0 done; 1 it did not work; 2 wrong command line; 3 wrong setting or environment; 4 a port or socket is taken;
5 a model is unknown, broken or cannot be fetched; 6 the service does not run or answer; 7 database or disk;
130 interrupted with Ctrl-C."""

app = typer.Typer(
    name="helixflow",
    help="HelixFlow: a self-hosted AI inference platform with an OpenAI-compatible API over real models.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def read_global_options(
    context: typer.Context,
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Configuration file; default: $HELIXFLOW_CONFIG.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", metavar="DIR", help="Where models, keys and sockets are kept.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
) -> None:
    invocation = context.ensure_object(Invocation)
    invocation.config = config_file
    invocation.data_dir = data_dir
    invocation.debug = debug


app.command("serve", epilog=serve.EPILOG)(serve.serve_command)
app.command("chat", epilog=chat.EPILOG)(chat.chat_command)
app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor_command)
app.command("version", epilog=version.EPILOG)(version.version_command)
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(config.app, name="config")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (`sys.argv` by default); returns the exit code of `core.errors.ExitCode`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character shows another one.
            stream.reconfigure(errors="replace")
    invocation = Invocation()
    return int(run_guarded(lambda: _run(arguments, invocation), invocation))


def _run(arguments: Sequence[str] | None, invocation: Invocation) -> int:
    try:
        result = get_command(app).main(args=arguments, prog_name="helixflow", standalone_mode=False, obj=invocation)
    except TyperException as exc:
        message = exc.format_message()
        context = getattr(exc, "ctx", None)
        # Without arguments a group has shown its help already.
        if type(exc).__name__ != "NoArgsIsHelpError":
            path = context.command_path if context is not None else "helixflow"
            print_error(f"{message.rstrip('.')}; try: {path} --help")
        return ExitCode.USAGE
    except typer.Abort:
        return ExitCode.INTERRUPTED
    return result if isinstance(result, int) else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
