"""What is recorded of every request: one log line, and the metrics.

At once, while its figures are in the processor's cache: keeping a hundred finished requests to record them together
was measured twice as dear, because their memory could not be used again in the meantime.
"""

import time

from helixflow.core.call import Operation
from helixflow.core.errors import ErrorKind
from helixflow.core.keys import mask_secrets
from helixflow.gateway.exchange import Exchange
from helixflow.gateway.surfaces.control_plane import is_control_plane
from helixflow.telemetry.metrics import GatewayMetrics
from helixflow.telemetry.requests import RequestLog, RequestRecord

# An enumeration's `value` is a property in Python.
_OPERATIONS: dict[Operation | None, str] = {None: "other", **{operation: operation.value for operation in Operation}}
_KINDS = frozenset(kind.value for kind in ErrorKind)


class Observation:
    """Records finished exchanges; `flush` before the process ends."""

    def __init__(self, metrics: GatewayMetrics, log: RequestLog) -> None:
        self._metrics = metrics
        self._log = log
        metrics.lost_log_writes = lambda: log.lost

    def flush(self) -> None:
        self._log.flush()

    def record(self, exchange: Exchange) -> None:
        """Called once for each exchange, after its last byte or its end by any other way.

        Answers to probes and scrapes are counted, not logged: a line a second would bury the rest.
        """
        started = exchange.started
        duration = time.perf_counter() - started
        status = 499 if exchange.disconnected else exchange.status
        operation = _OPERATIONS[exchange.operation]
        progress = exchange.progress
        deployment = progress.deployment if progress is not None else ""
        error = exchange.error
        # An upstream's own code is no label: there is no end of them.
        kind = "" if error is None else error if error in _KINDS else "upstream_error"
        series = self._metrics.series(operation, deployment, status, kind)
        series.requests += 1
        series.duration.observe(duration)
        record = RequestRecord(
            timestamp=self._log.timestamp(time.time()),
            request_id=exchange.request_id,
            call_id=exchange.call_id,
            operation=operation if exchange.operation is not None else mask_secrets(exchange.path[:128]),
            status=status,
            scheme=exchange.scope["scheme"],
            duration_s=int(duration * 1e6) / 1e6,
            model=exchange.model,
            stream=exchange.stream,
            error=error,
        )
        if status >= 500 or (error is not None and status == 200):
            record.level = "error"
        principal = exchange.principal
        if principal is not None:
            record.key_id = principal.id
            record.project = principal.project_id
        if progress is not None:
            usage = progress.usage
            completion_tokens = usage.completion_tokens
            record.deployment = deployment
            record.prompt_tokens = usage.prompt_tokens
            record.completion_tokens = completion_tokens
            record.finish_reason = progress.finish_reason
            if progress.resumed:
                record.resumed = progress.resumed
                series.resumed += progress.resumed
            series.tokens_in += usage.prompt_tokens
            series.tokens_out += completion_tokens
            if progress.first_content_at is not None:
                first = progress.first_content_at - started
                record.first_token_s = int(first * 1e6) / 1e6
                series.first_token.observe(first)
                if completion_tokens > 1:
                    series.inter_token.observe((duration - first) / (completion_tokens - 1))
        if exchange.operation is not None or status not in (200, 503) or is_control_plane(exchange.path):
            self._log.add(record)
