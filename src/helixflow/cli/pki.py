"""`helixflow pki`: the certificate authority of this data directory. Works on files; no service needs to run."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from helixflow.cli.invocation import invocation_of
from helixflow.cli.output import format_time, print_json, print_lines, print_table
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from helixflow.pki.issuing import Issuance

app = typer.Typer(
    help="The platform's certificate authority: services, HTTPS, and how to trust it.",
    epilog="Example:\n\n$ helixflow pki show\n\n$ helixflow pki issue gateway --out gateway.pem",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Longer than it takes any process of this node to look at its files.
_SETTLE_S = 3.0


@app.command(
    "init",
    epilog="Example:\n\n$ helixflow pki init\n\n$ helixflow pki init --ca-certificate chain.pem --ca-key issuing.key",
)
def init_command(
    context: typer.Context,
    ca_certificate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Take over this authority: its certificate, then those above it up to the root (PEM)."
        ),
    ] = None,
    ca_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key (PEM, not encrypted).")] = None,
) -> None:
    """Create the certificate authority, or take over one of yours. `helixflow serve` creates one by itself."""
    issuance = _open(context)
    _check_pair(ca_certificate, ca_key)
    issuance.init(ca_certificate, ca_key)
    _print_authority(issuance)


@app.command(
    "issue",
    epilog="Example:\n\n$ helixflow pki issue gateway --out gateway.pem --hours 720\n\n"
    "$ helixflow pki issue https --name api.example.com --out https.pem",
)
def issue_command(
    context: typer.Context,
    service: Annotated[str, typer.Argument(help="gateway, control, auth, pool, console, monitoring or https.")],
    name: Annotated[
        list[str] | None, typer.Option(metavar="DNS", help="A further DNS name or address; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="For another node: write it there.")] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0.1, max=24 * 90, help="Its life, 90 days at most; default: pki.certificate_hours."),
    ] = None,
) -> None:
    """Issue a certificate: for a service of this node, or into a file for another one, whose pool renews it."""
    issuance = _open(context)
    if out is None:
        if name or hours is not None:
            raise UserError(
                "--name and --hours go with --out; this node's follow gateway.tls_names and pki.certificate_hours",
                ExitCode.USAGE,
            )
        issuance.issue(service)
        print_lines(f"issued {issuance.folder.service_file(service)}")
        return
    from helixflow.pki.files import write_atomically
    from helixflow.pki.names import parse_names

    write_atomically(out, issuance.issue_elsewhere(service, parse_names(name or ()), hours), 0o600)
    print_lines(
        f"issued {out} (private key and certificate)",
        f"On the other node it belongs to data_dir/pki/services/{service}.pem with mode 600, "
        f"and a copy of {issuance.folder.ca_certificate} to data_dir/pki/ca.crt.",
    )


@app.command("rotate", epilog="Example:\n\n$ helixflow pki rotate\n\n$ helixflow pki rotate --ca")
def rotate_command(
    context: typer.Context,
    ca: Annotated[bool, typer.Option("--ca", help="The authority too; the old one stays trusted for a while.")] = False,
    ca_certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --ca: the new authority, as for `init`.")
    ] = None,
    ca_key: Annotated[Path | None, typer.Option(metavar="FILE", help="With --ca: its private key.")] = None,
    settle: Annotated[
        float,
        typer.Option(
            min=0,
            help="With --ca: seconds from trusting the new authority to using it; copy ca.crt to other nodes then.",
        ),
    ] = _SETTLE_S,
) -> None:
    """Issue all certificates of this node anew. Running services take them over without dropping a connection."""
    issuance = _open(context)
    _check_pair(ca_certificate, ca_key)
    if ca_certificate is not None and not ca:
        raise UserError("--ca-certificate and --ca-key go with --ca", ExitCode.USAGE)
    if ca:
        issuance.trust_successor(ca_certificate, ca_key, settle=lambda: time.sleep(settle))
        _print_authority(issuance)
    else:
        print_lines(*(f"issued {issuance.folder.service_file(service)}" for service in issuance.rotate()))


@app.command("show", epilog="Example:\n\n$ helixflow pki show\n\n$ helixflow pki show --json")
def show_command(context: typer.Context, as_json: Json = False) -> None:
    """Show the authority, how to trust it, and the certificates of this node."""
    issuance = _open(context)
    from helixflow.pki.overview import describe

    overview = describe(issuance.folder, time.time())
    if as_json:
        print_json({"ca_certificate": str(issuance.folder.ca_certificate), **asdict(overview)})
        return
    _print_authority(issuance)
    print_lines("")
    print_table(
        ("certificate", "state", "expires", "serial"),
        [
            (one.service, one.state, format_time(one.expires_at) if one.serial else "", one.serial or one.problem)
            for one in overview.certificates
        ],
    )


@app.command(
    "revoke", epilog="Example:\n\n$ helixflow pki revoke gateway\n\n$ helixflow pki revoke 5f2a9c0d1e3b4a5f6071829304"
)
def revoke_command(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="SERVICE|SERIAL", help="All certificates of a service, or one.")],
    as_json: Json = False,
) -> None:
    """Stop accepting certificates, on this node within a second; a service of this node gets a new one."""
    issuance = _open(context)
    serials = issuance.revoke(what)
    if as_json:
        print_json({"revoked": serials})
        return
    print_lines(*(f"revoked {serial}" for serial in serials))
    print_lines(f"Other nodes: copy {issuance.folder.revoked} to their data_dir/pki/.")


def _open(context: typer.Context) -> "Issuance":
    settings = invocation_of(context).load_settings()
    from helixflow.pki.issuing import Issuance

    return Issuance(settings)


def _check_pair(certificate: Path | None, key: Path | None) -> None:
    if (certificate is None) != (key is None):
        raise UserError("give --ca-certificate and --ca-key together", ExitCode.USAGE)


def _print_authority(issuance: "Issuance") -> None:
    from helixflow.pki.overview import describe
    from helixflow.pki.trust import trust_instructions

    path = issuance.folder.ca_certificate
    overview = describe(issuance.folder, time.time())
    for root in overview.roots:
        print_lines(f"{root.name}, until {format_time(root.expires_at)}", f"  SHA-256 {root.fingerprint}")
    where = "on this node" if overview.issues_here else "elsewhere: this node only uses what it is given"
    print_lines(f"  certificates are issued {where}", "", f"How to trust it ({path}):")
    print_lines(*(f"  {line}" for line in trust_instructions(path)))
