"""The greeting after a start: one real question through the gateway, then how to connect.

    python -m helixflow.cli.welcome --base-url URL --https-url URL --key-file FILE [--chat-model NAME] …

A process of its own, started by the launcher once everything serves: what goes wrong here never touches the service.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from helixflow.cli.api import Answer, ApiClient, ChatRequest
from helixflow.cli.failures import print_error, run_guarded
from helixflow.cli.invocation import Invocation
from helixflow.cli.output import print_lines, printable
from helixflow.core.errors import ExitCode, HelixError, UserError
from helixflow.settings.client import ClientEnvironment, client_environment

SYSTEM = "You are a helpful assistant."
QUESTION = "What is the capital of France?"
TIMEOUT_S = 120.0
_MAX_TOKENS = 128
_POLL_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="helixflow.cli.welcome", description=__doc__)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--https-url", required=True)
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--chat-model")
    parser.add_argument("--embedding-model")
    given = parser.parse_args(argv)

    def greet() -> int:
        key = read_key(given.key_file, client_environment())
        code = ExitCode.OK
        if given.chat_model is not None:
            code = asyncio.run(ask(given.base_url, key, given.chat_model))
        print_lines(*connection_lines(given.base_url, given.https_url, key, given.chat_model, given.embedding_model))
        return code

    return int(run_guarded(greet, Invocation()))


def read_key(file: Path, environment: ClientEnvironment) -> str:
    """The first API key: the operator's own, or the one in `file`. Raises `UserError`."""
    if environment.bootstrap_api_key is not None:
        return environment.bootstrap_api_key
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise UserError(f"{file}: the API key cannot be read", ExitCode.STORAGE) from exc


async def ask(base_url: str, key: str, model: str) -> ExitCode:
    """Asks the one question, shows the answer as it comes and what was measured; a failure is one line."""
    client = ApiClient(base_url, key)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    request = ChatRequest(model, messages, temperature=0.0, max_tokens=_MAX_TOKENS)
    await _until_ready(client)
    print_lines("", f"Asking {model}: {QUESTION}")
    sys.stdout.write("Answer: ")
    sys.stdout.flush()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            answer = await client.complete(request, _show)
    except (HelixError, TimeoutError) as exc:
        reason = exc.message if isinstance(exc, HelixError) else f"no complete answer within {TIMEOUT_S:.0f} s"
        print_lines("")
        sys.stdout.flush()
        print_error(f"the welcome question failed: {reason} The service keeps running.")
        return ExitCode.FAILURE
    finally:
        await client.close()
    print_lines("", figures(answer))
    return ExitCode.OK


def figures(answer: Answer) -> str:
    """What was measured, in one line."""
    first = f"{answer.first_token_s:.2f} s" if answer.first_token_s is not None else "not measured"
    speed = f"{answer.tokens_per_s:.0f} tokens/s" if answer.tokens_per_s is not None else "too short to measure"
    return f"Time to first token {first}, then {speed} ({answer.completion_tokens} tokens in {answer.total_s:.2f} s)."


def connection_lines(base_url: str, https_url: str, key: str, chat: str | None, embedding: str | None) -> list[str]:
    """How to connect, to be copied as it stands. Model names and keys hold no character that quoting minds."""
    lines = ["", f"Base URL  {base_url}", f"API key   {key}"]
    lines.append(f"HTTPS     {https_url} (how to trust its certificate: helixflow pki show)")
    if chat is not None:
        lines += [
            "",
            "With curl:",
            "",
            f"curl {base_url}/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' "
            f'-d \'{{"model": "{chat}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'',
            "",
            "With OpenAI's SDK for Python (pip install openai):",
            "",
            "from openai import OpenAI",
            "",
            f'client = OpenAI(base_url="{base_url}", api_key="{key}")',
            "answer = client.chat.completions.create(",
            f'    model="{chat}", messages=[{{"role": "user", "content": "Hello!"}}]',
            ")",
            "print(answer.choices[0].message.content)",
        ]
    elif embedding is not None:
        lines += [
            "",
            "With curl:",
            "",
            f"curl {base_url}/embeddings -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' "
            f'-d \'{{"model": "{embedding}", "input": "Hello!"}}\'',
            "",
            "With OpenAI's SDK for Python (pip install openai):",
            "",
            "from openai import OpenAI",
            "",
            f'client = OpenAI(base_url="{base_url}", api_key="{key}")',
            f'answer = client.embeddings.create(model="{embedding}", input="Hello!")',
            "print(len(answer.data[0].embedding))",
        ]
    return [*lines, "", "Serving until Ctrl-C.", ""]


async def _until_ready(client: ApiClient) -> None:
    """Waits while models load, so that what is measured is an answer and not a start; not for ever."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + TIMEOUT_S
    # A gateway that cannot be asked will not answer the question either, and then says why.
    with contextlib.suppress(HelixError):
        while loop.time() < give_up and not await client.is_ready():  # noqa: ASYNC110  (another process)
            await asyncio.sleep(_POLL_S)


def _show(text: str) -> None:
    sys.stdout.write(printable(text))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
