"""A conversation: what was said so far, the answers as they come, and the commands between them."""

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from helixflow.cli.api import Answer, ApiClient, ChatRequest
from helixflow.cli.failures import print_error
from helixflow.cli.output import print_lines, printable
from helixflow.core.errors import HelixError, UserError

_PROMPT = "> "
_HELP = """/help              this list
/reset             forget what was said, keep the system message
/model [NAME]      show the models, or go on with another one
/system [TEXT]     show the system message, or set another one (and forget what was said)
/save FILE         write the conversation as JSON
/quit              leave (Ctrl-D does, too)"""


class Session:
    """Asks `client`, keeping the history in `request.messages`. `runner` is where its coroutines run.

    A question whose answer fails leaves no trace; one whose answer was stopped keeps what had come.
    """

    def __init__(self, runner: asyncio.Runner, client: ApiClient, request: ChatRequest) -> None:
        self._runner = runner
        self._client = client
        self._request = request

    def ask(self, question: str, *, show: bool = True) -> Answer:
        """One question and its answer, shown as it comes. Raises `HelixError`, or `KeyboardInterrupt` when stopped."""
        asked = [*self._request.messages, {"role": "user", "content": question}]
        texts: list[str] = []

        def take(text: str) -> None:
            texts.append(text)
            if show:
                sys.stdout.write(printable(text))
                sys.stdout.flush()

        try:
            answer = self._runner.run(self._client.complete(replace(self._request, messages=asked), take))
        finally:
            if show and texts and not texts[-1].endswith("\n"):
                sys.stdout.write("\n")
            if texts:
                said = {"role": "assistant", "content": "".join(texts)}
                self._request = replace(self._request, messages=[*asked, said])
        if show:
            self._print_figures(answer)
        return answer

    def talk(self) -> None:
        """Reads lines until the end of input or /quit."""
        import readline  # noqa: F401  (gives `input` line editing and a memory)

        print_lines(f"{self._request.model} at {self._client.base_url}: /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = input(_PROMPT).strip()
            except EOFError:
                sys.stdout.write("\n")
                return
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                continue
            except UnicodeDecodeError:
                print_error("that line is not UTF-8 text")
                continue
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    line.encode()
                    self.ask(line)
            except KeyboardInterrupt:
                print_lines("(stopped)")
            except UnicodeEncodeError:
                print_error("that line is not UTF-8 text")
            except (HelixError, UserError) as exc:
                print_error(exc.message)

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/help":
                print_lines(_HELP)
            case "/reset":
                self._forget()
                print_lines("(forgotten)")
            case "/model" if rest:
                self._request = replace(self._request, model=rest)
                print_lines(f"(now {rest})")
            case "/model":
                names = self._runner.run(self._client.list_models())
                print_lines(*(f"{'*' if name == self._request.model else ' '} {name}" for name in names))
            case "/system" if rest:
                self._request = replace(self._request, messages=[{"role": "system", "content": rest}])
                print_lines("(set)")
            case "/system":
                system = [message["content"] for message in self._request.messages if message["role"] == "system"]
                print_lines(*(system or ["(none)"]))
            case "/save" if rest:
                self._save(Path(rest).expanduser())
            case "/save":
                print_error("give a file name: /save FILE")
            case _:
                print_error(f"no command {command}; /help lists them")

    def _forget(self) -> None:
        kept = [message for message in self._request.messages if message["role"] == "system"]
        self._request = replace(self._request, messages=kept)

    def _save(self, path: Path) -> None:
        """Conversations are private: the file is its owner's alone, and nothing is overwritten."""
        text = json.dumps(
            {"model": self._request.model, "messages": self._request.messages}, indent=2, ensure_ascii=False
        )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        except FileExistsError:
            print_error(f"{path} exists; choose another name")
        except (OSError, RuntimeError, ValueError) as exc:
            print_error(f"{path}: cannot be written: {getattr(exc, 'strerror', None) or exc}")
        else:
            print_lines(f"(saved to {path})")

    def _print_figures(self, answer: Answer) -> None:
        if not (sys.stdout.isatty() and sys.stderr.isatty()):
            return
        parts = [f"{answer.completion_tokens} tokens"]
        if answer.first_token_s is not None:
            parts.append(f"first after {answer.first_token_s:.2f} s")
        if answer.tokens_per_s is not None:
            parts.append(f"{answer.tokens_per_s:.0f} tokens/s")
        if answer.finish_reason == "length":
            parts.append("cut at the token limit")
        sys.stdout.flush()
        sys.stderr.write(f"[{', '.join(parts)}]\n")
