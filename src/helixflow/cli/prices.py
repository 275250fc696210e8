"""`helixflow prices`: what models and deployments cost."""

import time
from typing import Annotated, Any

import typer

from helixflow.cli.administration import Json, administer, cell, part, present, show_fields
from helixflow.cli.moments import parse_expiry, parse_moment, rfc3339
from helixflow.cli.output import print_json, print_lines, print_table
from helixflow.core.errors import ExitCode, UserError

app = typer.Typer(
    help="List, show, set and end prices, in US dollars.",
    epilog="Example:\n\n$ helixflow prices show gpt-4o\n\n"
    "$ helixflow prices set --model gpt-4o --input 2.50 --output 10",
    no_args_is_help=True,
)
_TIER_PARTS = ("from_prompt_tokens", "input", "cached_input", "output")


@app.command("list", epilog="Example:\n\n$ helixflow prices list\n\n$ helixflow prices list --subject gpt-4o --json")
def list_command(
    context: typer.Context,
    subject: Annotated[
        str | None, typer.Option("--subject", metavar="NAME", help="Only of this model or deployment.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what deployments cost for which no price is set, then all prices that were set, latest first."""
    prices = administer(context, lambda api: api.collect("/prices", {"subject": subject}))
    if as_json:
        print_json({"prices": prices})
        return
    print_table(
        ("for", "input", "cached", "output", "other", "from", "to", "source", "id"),
        [
            (
                price["subject"],
                *(price["rates"][name] for name in ("input", "cached_input", "output")),
                _others(price["rates"]),
                *(cell(price[name]) for name in ("valid_from", "valid_to", "source", "id")),
            )
            for price in prices
        ],
    )


@app.command(
    "show",
    epilog="Example:\n\n$ helixflow prices show gpt-4o/openai-0\n\n$ helixflow prices show gpt-4o --at 2027-01-31",
)
def show_command(
    context: typer.Context,
    subject: Annotated[
        str, typer.Argument(metavar="NAME", help="A model, a deployment, or the version of a price that a request has.")
    ],
    at: Annotated[
        str | None, typer.Option("--at", metavar="WHEN", help="As it is then, a date or a time (UTC); default: now.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a model or deployment costs, for a million tokens."""
    query = {"subject": subject, "at": parse_moment(at, "--at") if at is not None else None}
    _show(administer(context, lambda api: api.ask("GET", "/prices/current", query=query)), as_json)


@app.command(
    "set",
    epilog="Example:\n\n$ helixflow prices set --model gpt-4o --input 2.50 --cached-input 1.25 --output 10\n\n"
    "$ helixflow prices set --deployment smollm2-135m-instruct/llama_cpp-0 --engine-second 0.0002 --from 2027-01-01\n\n"
    "$ helixflow prices set --model long --input 1.25 --output 10 --tier 200001:2.5:0.25:15",
)
def set_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="The model that it is for.")] = None,
    deployment: Annotated[
        str | None, typer.Option("--deployment", metavar="NAME", help="The deployment, such as gpt-4o/openai-0.")
    ] = None,
    input_rate: Annotated[
        str | None, typer.Option("--input", metavar="DOLLARS", help="For a million prompt tokens.")
    ] = None,
    cached_input: Annotated[
        str | None,
        typer.Option("--cached-input", metavar="DOLLARS", help="For those that were cached; default: as --input."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="DOLLARS", help="For a million completion tokens.")
    ] = None,
    request: Annotated[str | None, typer.Option("--request", metavar="DOLLARS", help="For each request.")] = None,
    engine_second: Annotated[
        str | None, typer.Option("--engine-second", metavar="DOLLARS", help="For each second of the engine's time.")
    ] = None,
    tiers: Annotated[
        list[str] | None,
        typer.Option(
            "--tier",
            metavar="TOKENS:INPUT:CACHED:OUTPUT",
            help="Other rates from that many prompt tokens on, for the whole request. Several times, growing.",
        ),
    ] = None,
    begin: Annotated[
        str | None, typer.Option("--from", metavar="WHEN", help="From then on: 30d, a date or a time; default: now.")
    ] = None,
    end: Annotated[
        str | None, typer.Option("--to", metavar="WHEN", help="Until then; default: until further notice.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set what a model or a deployment costs. What was set before ends there; what is not given is not charged."""
    if (model is None) == (deployment is None):
        raise UserError("give either --model or --deployment", ExitCode.USAGE)
    rates: dict[str, Any] = present(
        input=input_rate, cached_input=cached_input, output=output, request=request, engine_second=engine_second
    )
    if tiers:
        rates["tiers"] = [_tier(text) for text in tiers]
    if not rates:
        raise UserError("say what it costs; 0 for nothing, as in: --input 0", ExitCode.USAGE)
    now = time.time()
    body = present(
        subject_kind="deployment" if model is None else "model",
        subject=deployment if model is None else model,
        rates=rates,
        valid_from=rfc3339(parse_expiry(begin, now, "--from")) if begin is not None else None,
        valid_to=rfc3339(parse_expiry(end, now, "--to")) if end is not None else None,
    )
    _show(administer(context, lambda api: api.ask("POST", "/prices", body)), as_json)


@app.command(
    "end",
    epilog="Example:\n\n$ helixflow prices end price_abc123\n\n$ helixflow prices end price_abc123 --at 2027-01-31",
)
def end_command(
    context: typer.Context,
    price_id: Annotated[str, typer.Argument(metavar="ID", help="Which one: an id out of the list.")],
    at: Annotated[
        str | None, typer.Option("--at", metavar="WHEN", help="Then: 30d, a date or a time; default: now.")
    ] = None,
    as_json: Json = False,
) -> None:
    """End a price, or withdraw one that has not begun: what it would have ended then goes on."""
    query = {"at": rfc3339(parse_expiry(at, time.time(), "--at")) if at is not None else None}
    price = administer(context, lambda api: api.ask("DELETE", f"/prices/{part(price_id)}", query=query))
    if as_json:
        print_json(price)
    elif price["valid_to"] == price["valid_from"]:
        print_lines(f"withdrew {price_id}, the price of {price['subject']} that was to begin {price['valid_from']}")
    else:
        print_lines(f"{price_id}, the price of {price['subject']}, ends {price['valid_to']}")


def _show(price: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(price)
        return
    rates = price["rates"]
    fields = [
        ("input", f"{rates['input']} for a million prompt tokens, {rates['cached_input']} where cached"),
        ("output", f"{rates['output']} for a million completion tokens"),
        ("request", rates["request"]),
        ("engine second", rates["engine_second"]),
    ]
    fields += [
        (
            f"from {tier['from_prompt_tokens']} tokens",
            f"input {tier['input']}, cached {tier['cached_input']}, output {tier['output']}",
        )
        for tier in rates["tiers"]
    ]
    if price["valid_from"] or price["valid_to"]:
        fields.append(("valid", f"{cell(price['valid_from'])} to {cell(price['valid_to'])}"))
    if price["id"]:
        fields.append(("id", price["id"]))
    fields += [("source", price["source"]), ("version", price["price_version"])]
    show_fields(price["subject"] or f"version {price['price_version']}", fields)


def _others(rates: dict[str, Any]) -> str:
    """What is charged beside tokens, in a word each."""
    parts = [
        f"{rates[name]} a {word}"
        for name, word in (("request", "request"), ("engine_second", "second"))
        if rates[name] != "0.00"
    ]
    if rates["tiers"]:
        parts.append(f"{len(rates['tiers'])} tiers" if len(rates["tiers"]) > 1 else "1 tier")
    return ", ".join(parts)


def _tier(text: str) -> dict[str, Any]:
    """`200001:2.5:0.25:15`; an empty amount is left out."""
    parts = text.split(":")
    if len(parts) != len(_TIER_PARTS) or not (parts[0].isascii() and parts[0].isdigit() and len(parts[0]) <= 10):
        raise UserError(f"--tier {text!r}: give TOKENS:INPUT:CACHED:OUTPUT, as in 200001:2.5:0.25:15", ExitCode.USAGE)
    amounts = {name: part for name, part in zip(_TIER_PARTS[1:], parts[1:], strict=True) if part}
    return {"from_prompt_tokens": int(parts[0]), **amounts}
