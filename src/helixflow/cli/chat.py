"""`helixflow chat`: one question, or a conversation."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from helixflow.cli.invocation import Invocation, invocation_of
from helixflow.cli.output import print_json, printable
from helixflow.core.errors import ErrorKind, ExitCode, HelixError, UserError

if TYPE_CHECKING:
    import asyncio

EPILOG = """Example:

$ helixflow chat "What is the capital of France?" --system "You are a helpful assistant."

$ helixflow chat

$ git diff | helixflow chat - --system "Summarise this change." --max-tokens 200

$ helixflow chat "Hello" --base-url https://api.openai.com/v1 --model gpt-4o-mini --json"""

MAX_PROMPT_BYTES = 16 * 2**20


def chat_command(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The question; - reads it from standard input.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model; default: the first chat model.")] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", help="Server; default: $HELIXFLOW_BASE_URL, or the configured gateway."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            help="Key; default: $HELIXFLOW_API_KEY, then $OPENAI_API_KEY for a foreign server, else the first key of "
            "this installation.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, max=2, help="0 for the likeliest words.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")] = None,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Show the answer when it is complete.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its figures as JSON.")] = False,
) -> None:
    """Talk to a model: one question, or without one a conversation.

    In a conversation the arrow keys edit and recall lines, Ctrl-C stops an answer, Ctrl-D leaves and /help lists the
    commands.
    """
    question = _read_question(prompt, interactive=not as_json)
    for name, text in (("--system", system), ("--model", model)):
        _require_text(text, name)
    import asyncio

    with asyncio.Runner() as runner:
        _converse(
            runner,
            invocation_of(context),
            question,
            model=model,
            system=system,
            base_url=base_url,
            api_key=api_key,
            temperature=temperature,
            max_tokens=max_tokens,
            stream=not no_stream,
            as_json=as_json,
        )


def _converse(
    runner: "asyncio.Runner",
    invocation: Invocation,
    question: str | None,
    *,
    model: str | None,
    system: str | None,
    base_url: str | None,
    api_key: str | None,
    temperature: float | None,
    max_tokens: int | None,
    stream: bool,
    as_json: bool,
) -> None:
    settings = invocation.load_settings()
    from helixflow.cli.api import ChatRequest
    from helixflow.cli.session import Session
    from helixflow.cli.target import choose_model, choose_target, connect
    from helixflow.settings.client import client_environment

    target = choose_target(settings, client_environment(), base_url, api_key)
    client = runner.run(connect(target))
    try:
        chosen = model if model is not None else runner.run(choose_model(client, settings))
        messages = [{"role": "system", "content": system}] if system else []
        request = ChatRequest(chosen, messages, temperature=temperature, max_tokens=max_tokens, stream=stream)
        session = Session(runner, client, request)
        if question is None:
            session.talk()
        elif as_json:
            answer = session.ask(question, show=False)
            print_json(
                {
                    "model": answer.model,
                    "content": answer.text,
                    "finish_reason": answer.finish_reason,
                    "prompt_tokens": answer.prompt_tokens,
                    "completion_tokens": answer.completion_tokens,
                    "time_to_first_token_s": _rounded(answer.first_token_s),
                    "total_s": _rounded(answer.total_s),
                    "tokens_per_s": _rounded(answer.tokens_per_s),
                }
            )
        else:
            session.ask(question)
    except HelixError as exc:
        if target.ours and exc.kind is ErrorKind.UPSTREAM_UNAVAILABLE:
            raise UserError(f"{exc.message}; start the service with: helixflow serve", ExitCode.UNAVAILABLE) from exc
        raise
    finally:
        runner.run(client.close())


def _read_question(prompt: str | None, *, interactive: bool) -> str | None:
    """The question of this run, None for a conversation. Raises `UserError` (USAGE)."""
    if prompt is None and interactive and sys.stdin.isatty():
        return None
    if prompt is None and sys.stdin.isatty():
        raise UserError("--json needs a question", ExitCode.USAGE)
    if prompt in (None, "-"):
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise UserError(f"the question is longer than {MAX_PROMPT_BYTES >> 20} MiB", ExitCode.USAGE)
        try:
            prompt = data.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise UserError("the question on standard input is not UTF-8 text", ExitCode.USAGE) from exc
    _require_text(prompt, "the question")
    assert prompt is not None
    if not prompt.strip():
        raise UserError("the question is empty", ExitCode.USAGE)
    return prompt


def _require_text(text: str | None, what: str) -> None:
    """Bytes on the command line that are no UTF-8 arrive as lone surrogates, which no request can carry."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as exc:
        raise UserError(f"{printable(what)} is not UTF-8 text", ExitCode.USAGE) from exc


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
