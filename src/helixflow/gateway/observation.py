"""What is recorded of every request: one log line, and the metrics.

Requests that are over wait here for a moment and are recorded together: a tight loop over many costs half of what the
same work costs between the steps of each request.
"""

import asyncio
import time

from helixflow.gateway.exchange import Exchange
from helixflow.telemetry.metrics import GatewayMetrics
from helixflow.telemetry.requests import RequestLog, RequestRecord

_FLUSH_AFTER_S = 0.1
_FLUSH_AT = 128


class Observation:
    """Records finished exchanges; `flush` before the process ends."""

    def __init__(self, metrics: GatewayMetrics, log: RequestLog) -> None:
        self._metrics = metrics
        self._log = log
        self._finished: list[Exchange] = []
        self._timer: asyncio.TimerHandle | None = None
        metrics.refresh = self.flush

    def record(self, exchange: Exchange) -> None:
        """Called once for each exchange, after its last byte or its end by any other way."""
        exchange.ended = time.perf_counter()
        self._finished.append(exchange)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_AFTER_S, self.flush)
        elif len(self._finished) >= _FLUSH_AT:
            self.flush()

    def flush(self) -> None:
        """Brings metrics and log up to date."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        finished, self._finished = self._finished, []
        offset = time.time() - time.perf_counter()
        self._log.write([self._observe(exchange, exchange.ended + offset) for exchange in finished])

    def _observe(self, exchange: Exchange, ended: float) -> RequestRecord:
        """Counts one exchange; returns its log line. `ended` is in seconds since the epoch."""
        started = exchange.started
        duration = exchange.ended - started
        status = 499 if exchange.disconnected else exchange.status
        operation = exchange.operation.value if exchange.operation is not None else "other"
        progress = exchange.progress
        deployment = progress.deployment if progress is not None else ""
        series = self._metrics.series(operation, deployment, status)
        series.requests += 1
        series.duration.observe(duration)
        principal = exchange.principal
        record = RequestRecord(
            timestamp=self._log.timestamp(ended),
            level="error" if status >= 500 else "info",
            request_id=exchange.request_id,
            call_id=exchange.call_id,
            operation=operation if exchange.operation is not None else exchange.path[:128],
            status=status,
            duration_s=round(duration, 6),
            key_id=principal.key_id if principal is not None else None,
            project=principal.project_id if principal is not None else None,
            model=exchange.model,
            deployment=deployment or None,
            stream=exchange.stream,
            error=exchange.error,
        )
        if progress is not None:
            usage = progress.usage
            completion_tokens = usage.completion_tokens
            record.prompt_tokens = usage.prompt_tokens
            record.completion_tokens = completion_tokens
            record.finish_reason = progress.finish_reason
            series.tokens_in += usage.prompt_tokens
            series.tokens_out += completion_tokens
            if progress.first_content_at is not None:
                first = progress.first_content_at - started
                record.first_token_s = round(first, 6)
                series.first_token.observe(first)
                if completion_tokens > 1:
                    series.inter_token.observe((duration - first) / (completion_tokens - 1))
        return record
