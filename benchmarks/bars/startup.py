"""From the command `helixflow serve`, with the model present, to the first token of an answer."""

import contextlib
import http.client
import tempfile
import time
from pathlib import Path

from benchmarks.processes import running
from benchmarks.report import RESULTS, Options, Result, median, spread
from benchmarks.targets import SERVE, chat_body, free_port, serve, serve_environment
from helixflow.core.keys import generate_key
from helixflow.settings.tree import DEFAULT_CHAT_MODEL

LIMIT_S = 6.0
# Kept between runs: the model is pulled once.
DATA_DIR = RESULTS / "data"
MODELS = f'[[models]]\nname = "{DEFAULT_CHAT_MODEL}"\n'


def run(options: Options) -> list[Result]:
    pull_model()
    times = [_time_to_first_token() for _ in range(options.rounds)]
    return [Result("startup", "serve to first token", median(times), "s", LIMIT_S, detail=spread(times))]


def pull_model() -> None:
    """Makes sure that the default model is in the benchmarks' data folder."""
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    with serve(MODELS, data_dir=DATA_DIR, pinned=False) as target:
        _await_first_token(target.port, target.api_key, time.monotonic() + 600)


def _time_to_first_token() -> float:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hf-")))
        port, key = free_port(), generate_key()
        config = folder / "helixflow.toml"
        config.write_text(f'data_dir = "{DATA_DIR}"\n[gateway]\nhttp_port = {port}\n[pool]\nport = 0\n{MODELS}')
        started = time.monotonic()
        stack.enter_context(
            running(
                SERVE,
                environment=serve_environment(config, key),
                log=folder / "serve.log",
                cwd=folder,
            )
        )
        _await_first_token(port, key, started + 60)
        return time.monotonic() - started


def _await_first_token(port: int, key: str, until: float) -> None:
    """Returns with the first content of a streamed answer; tries again while nothing listens or the model loads."""
    body = chat_body(DEFAULT_CHAT_MODEL, stream=True, max_tokens=8)
    answer = ""
    while time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            if response.status == 200:
                while line := response.readline():
                    if b'"content":"' in line and b'"content":""' not in line:
                        return
                raise RuntimeError("the stream ended without a word")
            answer = response.read(500).decode("utf-8", "replace")
        except OSError as exc:
            answer = str(exc)  # not listening yet
        finally:
            connection.close()
        time.sleep(0.02)
    raise RuntimeError(f"no first token in time: {answer}")
