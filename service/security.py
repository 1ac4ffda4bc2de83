"""Who may call, and what every answer tells a browser.

    AnswerHeaders -> Front -> CORS (answers preflights itself) -> KeyCheck -> the routes

API keys are optional; with any, a request must carry one unless its path is open. Whatever path is not named here asks
for a key, so a new route is never open by oversight. Model loading asks for an administrator's key besides.
"""

from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from fastapi import FastAPI, Response
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.access import Keys, given_keys, protocol_keys, read_keys
from service.errors import OriginRefused, ServiceError, Unauthorized, UnknownRoute
from service.pages import POLICY, ROUTES
from service.settings import Access, Settings

# An orchestrator asks these, and it holds no key.
HEALTH_ROUTES = ("/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
METRICS_ROUTES = ("/metrics",)
DOCS_ROUTES = (*ROUTES, "/docs", "/openapi.json")

HOW = "send one as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'"
REQUEST_HEADERS = ("Authorization", "X-API-Key", "Content-Type", "X-Request-ID", "traceparent", "tracestate")
ANSWER_HEADERS = ("X-Request-ID", "Retry-After", "Server-Timing", "WWW-Authenticate", "traceresponse")

FIXED_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",  # answers hold what is on somebody's picture
}
_FIXED = [(name.lower().encode(), value.encode()) for name, value in FIXED_HEADERS.items()]

Refuse = Callable[[ServiceError, Scope], Response]


def protect(app: FastAPI, settings: Settings, refuse: Refuse) -> None:
    """Adds KeyCheck and CORS to `app`, the innermost first; `refuse` writes the answer to an error."""
    routes: tuple[tuple[tuple[str, ...], Access], ...] = (
        (HEALTH_ROUTES, "open"),
        (METRICS_ROUTES, settings.metrics),
        (DOCS_ROUTES, settings.docs),
    )
    rules: dict[str, Access] = {path: access for paths, access in routes for path in paths}
    app.add_middleware(KeyCheck, rules=rules, keys=_keys(settings), refuse=refuse, origins=settings.cors_origins)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=REQUEST_HEADERS,
            expose_headers=ANSWER_HEADERS,
        )


def _keys(settings: Settings) -> Keys:
    """Where keys are asked for at all, an administrator's opens everything."""
    keys = [key.get_secret_value().encode() for key in settings.all_api_keys()]
    return Keys([*keys, *read_keys(settings.admin_key, settings.admin_key_file)] if keys else ())


class KeyCheck:
    """Refuses before anything of a body is read, and WebSockets of foreign pages, which no browser holds back."""

    def __init__(
        self, app: ASGIApp, rules: dict[str, Access], keys: Keys, refuse: Refuse, origins: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._rules = rules
        self._keys = keys
        self._refuse = refuse
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] != "lifespan" else None
        if error is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http" or "websocket.http.response" in scope.get("extensions", {}):
            await self._refuse(error, scope)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _error(self, scope: Scope) -> ServiceError | None:
        path = scope["path"]
        access = self._rules.get(path, "key")
        if access == "off":
            return UnknownRoute(f"{path} is switched off on this service, by LIMNER_METRICS or LIMNER_DOCS")
        headers = Headers(scope=scope)
        is_socket = scope["type"] == "websocket"
        if is_socket and (origin := headers.get("origin")) and not self._may_open(origin, headers.get("host", "")):
            return OriginRefused(
                f"pages of {origin[:100]} may not open a WebSocket here: LIMNER_CORS_ORIGINS lists the origins that may"
            )
        if access == "open" or not self._keys:
            return None
        offered = list(protocol_keys(scope["subprotocols"])) if is_socket else []
        if self._keys.are_in(headers) or any([key in self._keys for key in offered]):
            return None
        given = any(given_keys(headers)) or offered
        return Unauthorized(f"the API key is not known here: {HOW}" if given else f"an API key is needed: {HOW}")

    def _may_open(self, origin: str, host: str) -> bool:
        """A page of this very host may, those listed may; other clients than browsers send no origin."""
        return "*" in self._origins or origin in self._origins or urlsplit(origin).netloc.lower() == host.lower()


class AnswerHeaders:
    """`FIXED_HEADERS` on every answer, refusals and preflights too; a route's own value stays."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = message.get("headers", [])
                own = {name.lower() for name, _ in headers}
                message["headers"] = [*headers, *(each for each in _FIXED if each[0] not in own)]
            await send(message)

        await self._app(scope, receive, send_with_headers)
