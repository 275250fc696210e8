"""What is recorded of every request: one log line, and the metrics."""

import time

from helixflow.gateway.exchange import Exchange
from helixflow.telemetry.metrics import GatewayMetrics
from helixflow.telemetry.requests import RequestLog, RequestRecord


class Observation:
    """Records finished exchanges."""

    def __init__(self, metrics: GatewayMetrics, log: RequestLog) -> None:
        self._metrics = metrics
        self._log = log

    def record(self, exchange: Exchange) -> None:
        """Called once for each exchange, after its last byte or its end by any other way."""
        now = time.time()
        duration = time.perf_counter() - exchange.started
        status = exchange.status if not exchange.disconnected else 499
        operation = exchange.operation.value if exchange.operation is not None else "other"
        progress = exchange.progress
        record = RequestRecord(
            self._log.timestamp(now), exchange.request_id, exchange.call_id, operation, status, round(duration, 6)
        )
        series = self._metrics.series(operation, progress.deployment if progress is not None else "", status)
        series.requests.inc()
        series.duration.observe(duration)
        if exchange.operation is None:
            record.operation = exchange.path[:128]
        principal = exchange.principal
        if principal is not None:
            record.key_id = principal.key_id
            record.project = principal.project_id
        record.model = exchange.model
        record.stream = exchange.stream
        record.error = exchange.error
        if status >= 500:
            record.level = "error"
        if progress is not None:
            usage = progress.usage
            record.deployment = progress.deployment
            record.prompt_tokens = usage.prompt_tokens
            record.completion_tokens = usage.completion_tokens
            record.finish_reason = progress.finish_reason
            series.tokens_in.inc(usage.prompt_tokens)
            series.tokens_out.inc(usage.completion_tokens)
            if progress.first_content_at is not None:
                first = progress.first_content_at - exchange.started
                record.first_token_s = round(first, 6)
                series.first_token.observe(first)
                if usage.completion_tokens > 1:
                    series.inter_token.observe((duration - first) / (usage.completion_tokens - 1))
        self._log.write(record)
