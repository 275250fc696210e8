"""`helixflow pools`: the nodes that run models."""

from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, administer, cell, part
from helixflow.cli.output import format_size, print_json, print_lines, print_table
from helixflow.core.errors import ExitCode, UserError

app = typer.Typer(
    help="Show pools, and load, unload, pin and scale what they serve; for operators of the installation.",
    epilog="Example:\n\n$ helixflow pools list",
    no_args_is_help=True,
)

Deployment = Annotated[str, typer.Argument(metavar="DEPLOYMENT", help="As `pools show` lists it.")]
Pool = Annotated[
    str | None, typer.Option("--pool", metavar="NAME", help="On this pool; not needed while there is only one.")
]


@app.command("list", epilog="Example:\n\n$ helixflow pools list")
def list_command(context: typer.Context, as_json: Json = False) -> None:
    """List the pools and what memory is taken."""
    pools = _read(context)
    if as_json:
        print_json({"pools": pools})
        return
    columns = ("pool", "address", "state", "cores", "memory", "gpus", "deployments")
    print_table(columns, [_pool_row(pool) for pool in pools])


@app.command("show", epilog="Example:\n\n$ helixflow pools show gpu-1")
def show_command(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The pool; default: the only one.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a pool serves."""
    pool = _find(_read(context), name)
    if as_json:
        print_json(pool)
        return
    for device in pool["devices"]:
        used, whole = format_size(device["used_bytes"]), format_size(device["memory_bytes"])
        print_lines(f"{device['name']} ({device['uuid']}): {used} of {whole}, {device['utilisation_percent']} % busy")
    columns = ("deployment", "state", "replicas", "busy", "memory", "pinned", "last used", "detail")
    print_table(columns, [_deployment_row(one) for one in pool["deployments"]])


@app.command("load", epilog="Example:\n\n$ helixflow pools load smollm2-135m-instruct/llama_cpp-0")
def load_command(context: typer.Context, deployment: Deployment, pool: Pool = None) -> None:
    """Start loading a deployment. Refused with the numbers when it cannot fit."""
    _change(context, pool, "load", {"deployment": deployment}, f"{deployment} is loading")


@app.command("unload", epilog="Example:\n\n$ helixflow pools unload smollm2-135m-instruct/llama_cpp-0")
def unload_command(context: typer.Context, deployment: Deployment, pool: Pool = None) -> None:
    """End the engines of a deployment once what they do is done. The next request loads it again."""
    _change(context, pool, "unload", {"deployment": deployment}, f"{deployment} is unloading")


@app.command("pin", epilog="Example:\n\n$ helixflow pools pin smollm2-135m-instruct/llama_cpp-0")
def pin_command(context: typer.Context, deployment: Deployment, pool: Pool = None) -> None:
    """Never unload a deployment to make room for another one."""
    _change(context, pool, "pin", {"deployment": deployment, "pinned": True}, f"{deployment} is pinned")


@app.command("unpin", epilog="Example:\n\n$ helixflow pools unpin smollm2-135m-instruct/llama_cpp-0")
def unpin_command(context: typer.Context, deployment: Deployment, pool: Pool = None) -> None:
    """Let a deployment make room for another one again."""
    _change(context, pool, "pin", {"deployment": deployment, "pinned": False}, f"{deployment} is not pinned")


@app.command("scale", epilog="Example:\n\n$ helixflow pools scale smollm2-135m-instruct/llama_cpp-0 2")
def scale_command(
    context: typer.Context,
    deployment: Deployment,
    replicas: Annotated[int, typer.Argument(metavar="REPLICAS", help="How many; 0: none, not on request either.")],
    pool: Pool = None,
) -> None:
    """Say how many replicas a deployment is to have. Until the pool starts again or its settings change."""
    done = f"{deployment}: {replicas} replica{'' if replicas == 1 else 's'}"
    _change(context, pool, "scale", {"deployment": deployment, "replicas": replicas}, done)


@app.command("drain", epilog="Example:\n\n$ helixflow pools drain gpu-1")
def drain_command(
    context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="The pool.")]
) -> None:
    """Give a pool nothing new; what runs there goes on."""
    _change(context, name, "drain", {"draining": True}, f"{name} takes nothing new")


@app.command("resume", epilog="Example:\n\n$ helixflow pools resume gpu-1")
def resume_command(
    context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="The pool.")]
) -> None:
    """Use a pool again that was drained."""
    _change(context, name, "drain", {"draining": False}, f"{name} is used again")


def _read(context: typer.Context) -> list[dict[str, Any]]:
    pools: list[dict[str, Any]] = administer(context, lambda api: api.ask("GET", "/pools"))["pools"]
    return pools


def _find(pools: list[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """The pool of that name, or the only one. Raises `UserError`."""
    if name is None and len(pools) == 1:
        return pools[0]
    found = next((pool for pool in pools if pool["name"] == name), None)
    if found is None:
        names = ", ".join(pool["name"] for pool in pools) or "none"
        wrong = f"there is no pool {name!r}" if name is not None else "say which pool"
        raise UserError(f"{wrong}; there are: {names}", ExitCode.USAGE)
    return found


def _change(context: typer.Context, pool: str | None, verb: str, body: dict[str, Any], done: str) -> None:
    name = pool if pool is not None else _find(_read(context), None)["name"]
    administer(context, lambda api: api.ask("POST", f"/pools/{part(name)}/{verb}", body))
    print_lines(f"{done} on {name}." if verb != "drain" else f"{done}.")


def _pool_row(pool: dict[str, Any]) -> tuple[str, ...]:
    state = "draining" if pool["draining"] else "serving" if pool["reachable"] else "does not answer"
    where = (pool["name"], pool["address"] or "this node", state)
    if not pool["reachable"]:
        return (*where, "-", "-", "-", "-")
    memory = f"{format_size(pool['ram_used_bytes'])} of {format_size(pool['ram_limit_bytes'])}"
    return (*where, str(pool["cores"]), memory, str(len(pool["devices"])), str(len(pool["deployments"])))


def _deployment_row(one: dict[str, Any]) -> tuple[str, ...]:
    # Not before it was loaded is known what it takes.
    memory = format_size(one["ram_bytes"] + one["gpu_bytes"] or None)
    planned = memory != "-" and not one["measured"]
    return (
        one["deployment"],
        one["state"],
        f"{one['replicas']} of {one['wanted_replicas']}",
        f"{one['busy']} of {one['slots']}",
        f"{memory} (planned)" if planned else memory,
        "yes" if one["pinned"] else "",
        cell(one["last_used_at"]) if one["last_used_at"] else "never",
        one["detail"] or "",
    )
