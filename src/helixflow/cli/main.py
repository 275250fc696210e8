"""The application: wires the command groups and is the entry point. Importing it must stay cheap."""

import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from helixflow.cli import (
    account,
    apply,
    audit,
    auth,
    budgets,
    chat,
    config,
    db,
    doctor,
    keys,
    limits,
    login,
    members,
    mfa,
    models,
    orgs,
    pki,
    pool,
    pools,
    prices,
    projects,
    redeem,
    requests,
    roles,
    serve,
    service_accounts,
    usage,
    users,
    version,
)
from helixflow.cli.failures import print_error, run_guarded
from helixflow.cli.invocation import Invocation
from helixflow.core.errors import ExitCode

_EPILOG = (
    "Example:\n\n$ helixflow serve --welcome\n\n$ helixflow --config helixflow.toml config check\n\n"
    '$ helixflow chat "What is the capital of France?"\n\n'
    "Exit codes: 0 done; 1 it did not work; 2 wrong command line; 3 wrong setting or environment; "
    "4 a port or socket is taken; 5 a model is unknown, broken or cannot be fetched; "
    "6 the service does not run or answer; 7 database or disk; 130 interrupted with Ctrl-C."
)

_COMMANDS: Final[dict[str, Callable[[typer.Typer], object]]] = {
    "serve": lambda app: app.command("serve", epilog=serve.EPILOG)(serve.serve_command),
    "pool": lambda app: app.command("pool", epilog=pool.EPILOG)(pool.pool_command),
    "apply": lambda app: app.command("apply", epilog=apply.EPILOG)(apply.apply_command),
    "chat": lambda app: app.command("chat", epilog=chat.EPILOG)(chat.chat_command),
    "models": lambda app: app.add_typer(models.app, name="models"),
    "redeem": lambda app: app.command("redeem", epilog=redeem.EPILOG)(redeem.redeem_command),
    "login": lambda app: app.command("login", epilog=login.EPILOG)(login.login_command),
    "logout": lambda app: app.command("logout", epilog=login.LOGOUT_EPILOG)(login.logout_command),
    "whoami": lambda app: app.command("whoami", epilog=account.WHOAMI_EPILOG)(account.whoami_command),
    "password": lambda app: app.command("password", epilog=account.PASSWORD_EPILOG)(account.password_command),
    "mfa": lambda app: app.add_typer(mfa.app, name="mfa"),
    "orgs": lambda app: app.add_typer(orgs.app, name="orgs"),
    "projects": lambda app: app.add_typer(projects.app, name="projects"),
    "users": lambda app: app.add_typer(users.app, name="users"),
    "members": lambda app: app.add_typer(members.app, name="members"),
    "roles": lambda app: app.add_typer(roles.app, name="roles"),
    "service-accounts": lambda app: app.add_typer(service_accounts.app, name="service-accounts"),
    "keys": lambda app: app.add_typer(keys.app, name="keys"),
    "prices": lambda app: app.add_typer(prices.app, name="prices"),
    "usage": lambda app: app.add_typer(usage.app, name="usage"),
    "requests": lambda app: app.add_typer(requests.app, name="requests"),
    "limits": lambda app: app.add_typer(limits.app, name="limits"),
    "budgets": lambda app: app.add_typer(budgets.app, name="budgets"),
    "pools": lambda app: app.add_typer(pools.app, name="pools"),
    "audit": lambda app: app.add_typer(audit.app, name="audit"),
    "auth": lambda app: app.add_typer(auth.app, name="auth"),
    "pki": lambda app: app.add_typer(pki.app, name="pki"),
    "config": lambda app: app.add_typer(config.app, name="config"),
    "db": lambda app: app.add_typer(db.app, name="db"),
    "doctor": lambda app: app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor_command),
    "version": lambda app: app.command("version", epilog=version.EPILOG)(version.version_command),
}


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


def build_app(names: Iterable[str] = _COMMANDS) -> typer.Typer:
    """The application with the commands of those names."""
    built = typer.Typer(
        name="helixflow",
        help="HelixFlow: a self-hosted AI inference platform with an OpenAI-compatible API over real models.",
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    built.callback()(read_global_options)
    for name in names:
        _COMMANDS[name](built)
    return built


app = build_app()


def needed_commands(arguments: Sequence[str]) -> list[str]:
    """The commands that a command line may mean: typer takes 10 ms to build each."""
    named = [position for position, word in enumerate(arguments) if word in _COMMANDS]
    if not named or not {"-h", "--help"}.isdisjoint(arguments[: named[0]]):
        return list(_COMMANDS)
    return list(dict.fromkeys(arguments[position] for position in named))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (`sys.argv` by default); returns the exit code of `core.errors.ExitCode`."""
    _provide_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character shows another one.
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    invocation = Invocation()
    return int(run_guarded(lambda: _run(words, invocation), invocation))


def _run(words: Sequence[str], invocation: Invocation) -> int:
    if words == ["version"]:
        # Scripts ask this often; typer loads pydantic to parse anything at all.
        version.version_command()
        return ExitCode.OK
    try:
        result = get_command(build_app(needed_commands(words))).main(
            args=words, prog_name="helixflow", standalone_mode=False, obj=invocation
        )
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


def _provide_streams() -> None:
    """A shell may start us with closed streams (`>&-`): they become /dev/null, so that no socket takes their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  (for good)


if __name__ == "__main__":
    sys.exit(main())
