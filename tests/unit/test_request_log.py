"""The line of a request: complete, one line, and without anything a client could forge."""

import json
import os
from pathlib import Path
from typing import Any, Literal

from helixflow.telemetry.requests import RequestLog, RequestRecord


def record(**fields: Any) -> RequestRecord:
    known: dict[str, Any] = {"timestamp": "2026-11-22T10:11:12.000Z", "request_id": "r", "call_id": "c",
                             "operation": "chat/completions", "status": 200, "duration_s": 0.5}  # fmt: skip
    return RequestRecord(**{**known, **fields})


def written(tmp_path: Path, style: Literal["text", "json"], *records: RequestRecord, on: bool = True) -> list[str]:
    path = tmp_path / "log"
    with path.open("w") as stream:
        log = RequestLog(stream, style, enabled=on)
        for each in records:
            log.add(each)
        log.flush()
    return path.read_text().splitlines()


async def test_json_lines_have_every_figure(tmp_path: Path) -> None:
    done = record(model="m", deployment="d", prompt_tokens=3, completion_tokens=4, first_token_s=0.1, key_id="k")
    (line,) = written(tmp_path, "json", done)
    fields = json.loads(line)
    assert fields["event"] == "request"
    assert (fields["status"], fields["model"], fields["prompt_tokens"], fields["key_id"]) == (200, "m", 3, "k")


async def test_text_lines_are_short(tmp_path: Path) -> None:
    (line,) = written(tmp_path, "text", record(model="m", prompt_tokens=3, completion_tokens=4, first_token_s=0.1))
    assert line == "10:11:12 200 chat/completions m 500 ms first 100 ms 3+4 tokens r -"


async def test_a_path_cannot_forge_a_line(tmp_path: Path) -> None:
    forged = record(operation="/x\n10:11:12 200 chat/completions m", status=404, error="not\nfound")
    for style in ("text", "json"):
        assert len(written(tmp_path, style, forged)) == 1  # type: ignore[arg-type]


async def test_a_log_that_is_off_writes_nothing(tmp_path: Path) -> None:
    assert written(tmp_path, "json", record(), on=False) == []


async def test_a_reader_that_went_away_costs_only_the_lines() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        log = RequestLog(stream, "json")
        for _ in range(2):
            log.add(record())
            log.flush()
        assert log.timestamp(86_400.25) == "1970-01-02T00:00:00.250Z"


async def test_a_full_disk_costs_only_the_lines() -> None:
    with Path("/dev/full").open("w") as stream:
        log = RequestLog(stream, "json")
        log.add(record())
        log.flush()
        log.add(record())
        log.flush()
        assert log.lost == 2
