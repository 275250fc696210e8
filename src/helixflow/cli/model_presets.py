"""`helixflow models presets`: the models that need no more than a name and a key."""

from typing import Annotated, Any

import typer

from helixflow.cli.output import print_json, print_table


def presets_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that can be configured with no more than their name and a key."""
    from helixflow.pool.presets import Presets

    presets = Presets.load()
    rows: list[dict[str, Any]] = []
    for preset in presets.all():
        provider = presets.provider_of(preset)
        rows.append(
            {
                "name": preset.name,
                "provider": preset.provider,
                "engine": provider.engine if provider else "llama_cpp",
                "model": (preset.model or preset.name) if provider else "",
                "context": preset.context,
                "base_url": provider.base_url if provider else "",
                "source": preset.source,
                "api_key_env": provider.api_key_env if provider else "",
            }
        )
    if as_json:
        print_json({"presets": rows})
        return
    print_table(
        ("name", "served by", "model there", "context", "key"),
        [
            (
                row["name"],
                row["provider"] or "this machine",
                row["model"] or row["source"],
                str(row["context"] or ""),
                row["api_key_env"] + (" (set)" if _is_set(row["api_key_env"]) else ""),
            )
            for row in rows
        ],
    )


def _is_set(variable: str) -> bool:
    from helixflow.settings.section import SecretRef

    try:
        return bool(variable and SecretRef(env=variable).read())
    except ValueError:
        return False
