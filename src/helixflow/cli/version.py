"""`helixflow version`."""

import platform
from typing import Annotated

import typer

from helixflow import __version__
from helixflow.cli.output import print_json, print_lines

EPILOG = """Example:

$ helixflow version

$ helixflow version --json"""


def version_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with Python and engine versions.")] = False,
) -> None:
    """Show the version of HelixFlow."""
    if not as_json:
        print_lines(f"helixflow {__version__}")
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        engine: str | None = version("xllamacpp")
    except PackageNotFoundError:
        engine = None
    print_json(
        {
            "name": "helixflow",
            "version": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "xllamacpp": engine,
        }
    )
