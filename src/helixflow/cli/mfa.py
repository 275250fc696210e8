"""`helixflow mfa`: one's own second factor."""

from typing import Any, Final

import typer

from helixflow.cli.administration import Json, administer
from helixflow.cli.failures import print_error
from helixflow.cli.output import print_json, print_lines
from helixflow.cli.prompts import ask_line, ask_secret, is_interactive
from helixflow.core.errors import ErrorKind, HelixError

app = typer.Typer(
    help="Turn your second factor on and off, and renew its recovery codes.",
    epilog="Example:\n\n$ helixflow mfa enrol",
    no_args_is_help=True,
)

_ATTEMPTS: Final = 3
_CODE: Final = "Code of your authenticator app, or a recovery code"


@app.command("enrol", epilog="Example:\n\n$ helixflow mfa enrol")
def enrol_command(context: typer.Context) -> None:
    """Turn a second factor on: give its secret to an authenticator app, and a code of that in return."""
    body = {"current_password": ask_secret("Password")}
    enrolment = administer(context, lambda api: api.ask("POST", "/auth/mfa/enrol", body))
    print_lines("For your authenticator app:", "", f"  {enrolment['secret']}", f"  {enrolment['uri']}", "", flush=True)
    answer = _confirm(context)
    print_lines("The second factor is on. Each of these replaces a code of the app, once:", "")
    _show_codes(answer["codes"])


@app.command("disable", epilog="Example:\n\n$ helixflow mfa disable")
def disable_command(context: typer.Context) -> None:
    """Turn your second factor off: the password alone is enough from then on."""
    body = {"current_password": ask_secret("Password"), "code": ask_line(_CODE)}
    administer(context, lambda api: api.ask("POST", "/auth/mfa/disable", body))
    print_lines("The second factor is off.")


@app.command("recovery-codes", epilog="Example:\n\n$ helixflow mfa recovery-codes")
def recovery_codes_command(context: typer.Context, as_json: Json = False) -> None:
    """Get new recovery codes; the old ones end."""
    body = {"current_password": ask_secret("Password"), "code": ask_line(_CODE)}
    answer = administer(context, lambda api: api.ask("POST", "/auth/mfa/recovery-codes", body))
    if as_json:
        print_json(answer)
        return
    print_lines("The old recovery codes have ended. Each of these replaces a code of the app, once:", "")
    _show_codes(answer["codes"])


def _confirm(context: typer.Context) -> Any:
    """A person who mistypes a code tries again: the app has the secret by now, and another enrolment would give a new
    one.
    """
    for _ in range(_ATTEMPTS - 1 if is_interactive() else 0):
        try:
            return _confirm_once(context)
        except HelixError as exc:
            if exc.kind not in (ErrorKind.INVALID_CREDENTIALS, ErrorKind.UNPROCESSABLE):
                raise
            print_error(exc.message)
    return _confirm_once(context)


def _confirm_once(context: typer.Context) -> Any:
    code = ask_line("Code of the app")
    return administer(context, lambda api: api.ask("POST", "/auth/mfa/confirm", {"code": code}))


def _show_codes(codes: list[str]) -> None:
    print_lines(*(f"  {code}" for code in codes), "", "Keep them now: they cannot be shown again.")
