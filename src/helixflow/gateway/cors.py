"""Cross-origin access, where it is configured."""

from helixflow.gateway.exchange import Exchange
from helixflow.settings.tree import CorsSettings

_EXPOSED = (
    b"x-request-id, x-helixflow-model, x-helixflow-deployment, openai-processing-ms, retry-after, etag, location, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


class Cors:
    """Decides by the Origin header. Without configured origins nothing is ever allowed."""

    def __init__(self, settings: CorsSettings) -> None:
        self._any = "*" in settings.origins
        self._origins = frozenset(origin.encode() for origin in settings.origins)
        self._max_age = b"%d" % settings.max_age_s
        self.enabled = bool(settings.origins)

    def apply(self, exchange: Exchange) -> bool:
        """Adds the response headers for an allowed origin; says whether it is one."""
        origin = exchange.headers.get(b"origin")
        if origin is None or not (self._any or origin in self._origins):
            return False
        allowed = b"*" if self._any else origin
        exchange.extra_headers += (
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        )
        return True

    def is_preflight(self, exchange: Exchange) -> bool:
        return exchange.method == "OPTIONS" and b"access-control-request-method" in exchange.headers

    async def reply_to_preflight(self, exchange: Exchange, methods: str) -> None:
        """Answers an allowed preflight request."""
        requested = exchange.headers.get(b"access-control-request-headers", b"authorization, content-type")
        await exchange.start(
            204,
            [
                (b"access-control-allow-methods", methods.encode()),
                (b"access-control-allow-headers", requested),
                (b"access-control-max-age", self._max_age),
            ],
        )
        await exchange.finish()
