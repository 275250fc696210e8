"""Structured logging to standard error: one event a line, text on a terminal, JSON otherwise.

Use: `log = structlog.get_logger("helixflow.pool")`, then `log.info("replica.ready", replica=…, load_s=…)`. Event names
are `noun.verb`. Never log prompts, answers, keys or tokens.
"""

import logging
import sys
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, WrappedLogger

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logging(
    level: str,
    format: Literal["auto", "text", "json"],
    *,
    service: str,
    stream: TextIO | None = None,
) -> None:
    """Sets up structlog and the standard library's logging for this process. Call once, in the entry point."""
    stream = stream if stream is not None else sys.stderr
    text = is_text(format, stream)
    unfailing = UnfailingStream(stream)

    def add_service(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("service", service)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if text else "iso", utc=not text),
        add_service,
    ]
    renderer: structlog.typing.Processor
    if text:
        renderer = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=24
        )
        tail: list[structlog.typing.Processor] = [renderer]
    else:
        renderer = structlog.processors.JSONRenderer()
        # Without local variables: they hold prompts and keys.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        tail = [structlog.processors.ExceptionRenderer(tracebacks), renderer]
    structlog.configure(
        processors=[*shared, *tail],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        # Line and line end in one piece: the processes of a node share their standard error.
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, unfailing)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(cast(TextIO, unfailing))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(LEVELS[level], logging.WARNING))


class UnfailingStream:
    """Writes to a stream what can be written. A full disk under the log must not end the process that it is about."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # Writes that failed, for whoever wants to tell.
        self.lost = 0

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self.lost += 1
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self.lost += 1


def is_text(format: Literal["auto", "text", "json"], stream: TextIO) -> bool:
    """Whether logs on `stream` are for people."""
    return format == "text" or (format == "auto" and stream.isatty())
