"""`helixflow config`: checks and shows the settings; plans and takes back changes of what is served."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helixflow.cli import config_versions
from helixflow.cli.invocation import invocation_of
from helixflow.cli.output import print_json, print_lines
from helixflow.cli.references import Location, find_problems
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from helixflow.settings.tree import Settings

app = typer.Typer(
    help="Check and show the settings; plan, list and take back changes of the models that are served.",
    epilog="Example:\n\n$ helixflow --config helixflow.toml config check\n\n$ helixflow config plan -f models.toml",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("check", epilog="Example:\n\n$ helixflow --config helixflow.toml config check")
def check_command(context: typer.Context, as_json: Json = False) -> None:
    """Check the configuration and everything that it refers to; exit code 3 when something is wrong."""
    invocation = invocation_of(context)
    try:
        settings = invocation.load_settings()
        problems = _problems(settings, _text_of(invocation.config))
    except UserError as exc:
        if exc.exit_code is not ExitCode.CONFIG:
            raise
        problems = exc.message.splitlines()
    if as_json:
        print_json({"ok": not problems, "problems": problems})
        if problems:
            raise typer.Exit(ExitCode.CONFIG.value)
    elif problems:
        raise UserError("\n".join(problems), ExitCode.CONFIG)
    else:
        print_lines("the configuration is fine")


@app.command("show", epilog="Example:\n\n$ helixflow config show\n\n$ helixflow config show --json")
def show_command(context: typer.Context, as_json: Json = False) -> None:
    """Show the settings in force, as TOML or JSON, and where those come from that are no defaults. Never a secret."""
    invocation = invocation_of(context)
    settings = invocation.load_settings()
    from helixflow.settings.masking import hide_secrets
    from helixflow.settings.origins import read_origins

    tree = hide_secrets(settings.model_dump(mode="json", exclude_none=True))
    origins = read_origins(invocation.config)
    if invocation.data_dir is not None:
        origins[("data_dir",)] = "--data-dir"
    if as_json:
        named = {_dotted(location): origin for location, origin in origins.items()}
        print_json({"settings": tree, "origins": named})
    else:
        print_lines(*render_toml(tree, origins))


app.command("plan", epilog=config_versions.PLAN_EPILOG)(config_versions.plan_command)
app.command("history", epilog=config_versions.HISTORY_EPILOG)(config_versions.history_command)
app.command("rollback", epilog=config_versions.ROLLBACK_EPILOG)(config_versions.rollback_command)
app.command("status", epilog=config_versions.STATUS_EPILOG)(config_versions.status_command)


def render_toml(tree: dict[str, Any], origins: dict[Location, str]) -> list[str]:
    """The settings as lines of TOML that read back the same; a comment names what a value comes from."""
    return list(_table(tree, (), origins))


def _table(table: dict[str, Any], location: Location, origins: dict[Location, str]) -> Iterator[str]:
    nested = []
    for key, value in table.items():
        if _is_table(value, (*location, key)) or _is_table_array(value):
            nested.append((key, value))
            continue
        origin = origins.get((*location, key))
        yield f"{key} = {_value(value)}{f'  # {origin}' if origin else ''}"
    for key, value in nested:
        below = (*location, key)
        name = ".".join(str(part) for part in below if isinstance(part, str))
        if isinstance(value, dict):
            yield ""
            yield f"[{name}]"
            yield from _table(value, below, origins)
            continue
        for index, child in enumerate(value):
            yield ""
            yield f"[[{name}]]"
            yield from _table(child, (*below, index), origins)


def _is_table(value: Any, location: Location) -> bool:
    # Header names are not ours to choose: written inline, quoted.
    return isinstance(value, dict) and location[-1] != "headers"


def _is_table_array(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{_value(key)} = {_value(child)}" for key, child in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_value(child) for child in value)}]"
    # JSON's strings are TOML's basic strings, but for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _problems(settings: "Settings", source: tuple[Path | None, str]) -> list[str]:
    """What is wrong with what the settings refer to, a line each: file and line where it stands there, and setting."""
    from helixflow.settings.lines import line_of

    path, text = source
    problems = []
    for location, reason in find_problems(settings):
        line = line_of(text, location) if path is not None else None
        where = f"{path}:{line}: " if line else ""
        problems.append(f"{where}{_dotted(location)}: {reason}")
    return problems


def _text_of(config: Path | None) -> tuple[Path | None, str]:
    from helixflow.settings.origins import config_path

    path = config_path(config)
    return path, path.expanduser().read_text(encoding="utf-8") if path is not None else ""


def _dotted(location: Location) -> str:
    dotted = ""
    for part in location:
        dotted += f"[{part}]" if isinstance(part, int) else f".{part}" if dotted else part
    return dotted
