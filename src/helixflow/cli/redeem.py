"""`helixflow redeem`: accepts an invitation, or sets a password."""

import shlex
from typing import Annotated

import typer

from helixflow.cli.administration import BaseUrl, ask_openly, present, server_of
from helixflow.cli.output import print_lines
from helixflow.cli.prompts import ask_line, ask_new_password, ask_secret, ask_whether, is_interactive
from helixflow.core.errors import ErrorKind, HelixError, UserError

EPILOG = 'Example:\n\n$ helixflow redeem\n\n$ cat token password | helixflow redeem --name "Grace Hopper"'


def redeem_command(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Option("--name", help="Your name, for an account that is new; asked for if absent.")
    ] = None,
    existing: Annotated[
        bool,
        typer.Option("--existing", help="Accept an invitation with the password that your account has."),
    ] = False,
    base_url: BaseUrl = None,
) -> None:
    """Accept an invitation, or set your password, with the token that you were given.

    Token and password are asked for, or read from standard input, a line each; never given on the command line.
    """
    server, _ = server_of(context, base_url)
    token = ask_secret("Token").strip()
    existing = existing or ask_whether("Do you sign in here with a password already?")
    if existing:
        password = ask_secret("Password")
    else:
        if name is None and is_interactive():
            name = ask_line("Your name (for a new account)", optional=True)
        password = ask_new_password("New password")
    body = present(token=token, password=password, name=name or None)
    try:
        redeemed = ask_openly(server, "/auth/redeem", body)
    except HelixError as exc:
        # A new password cannot be wrong.
        if existing or exc.kind is not ErrorKind.INVALID_CREDENTIALS:
            raise
        raise UserError(
            "this e-mail has an account already: redeem with its password: helixflow redeem --existing"
        ) from exc
    where = "" if server.ours else f" --base-url {shlex.quote(server.root_url)}"
    print_lines(
        f"The account of {redeemed['email']} is ready. Sign in:",
        f"helixflow login --email {shlex.quote(redeemed['email'])}{where}",
    )
