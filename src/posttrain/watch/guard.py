"""Who may talk to the page: a middleware in front of everything that the server serves, its websocket included.

A page on 127.0.0.1 can be reached by any web site that the user visits: by a name that was made to point there (DNS
rebinding, hence the check of Host), and by requests across sites (hence the check of Origin). What leaves is bound by a
Content-Security-Policy to this server.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# The library compiles its components in the browser and styles them inline; both need the two "unsafe" words. Nothing
# may be fetched elsewhere.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """`hosts`: the names under which the page may be asked for; None: any (then a token is what protects it)."""

    def __init__(self, app: App, hosts: frozenset[str] | None, token: str | None) -> None:
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(headers)
        if refusal is not None:
            await _answer(scope, send, 403, refusal)
        elif self.token is None or _is_token(_cookies(headers).get(_cookie_name(headers), ""), self.token):
            await self.app(scope, receive, _with_headers(send))
        else:
            await self._ask_for_token(scope, send, headers)

    def _refusal(self, headers: dict[str, str]) -> str | None:
        host = headers.get("host", "")
        origin = headers.get("origin")
        try:
            name, site = urlsplit(f"//{host}").hostname or "", None if origin is None else urlsplit(origin).netloc
        except ValueError:  # "[::1" and its like are no address
            return "this page is not served under that name"
        if self.hosts is not None and name not in self.hosts:
            return "this page is not served under that name"
        if site is not None and site != host:
            return "this page answers no other site"
        return None

    async def _ask_for_token(self, scope: Scope, send: Send, headers: dict[str, str]) -> None:
        """A right token in the address becomes a cookie, so that it stands in no address from then on."""
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"))
        given = dict(query).get("token", "")
        if scope["type"] == "http" and self.token is not None and _is_token(given, self.token):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            cookie = f"{_cookie_name(headers)}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            await _answer(scope, send, 303, "", {"location": "/" + scope["path"].lstrip("/") + (f"?{rest}" if rest else ""), "set-cookie": cookie})
        else:
            await _answer(scope, send, 401, "open the address that `posttrain watch` printed: it carries a token")


def _is_token(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _cookie_name(headers: dict[str, str]) -> str:
    """With the port, since browsers share cookies between the ports of a host."""
    return f"posttrain_{headers.get('host', '').rpartition(':')[2]}".replace("]", "").replace(".", "_")


def _cookies(headers: dict[str, str]) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def _with_headers(send: Send) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *((name.encode(), value.encode()) for name, value in HEADERS.items())]
        await send(message)

    return sent


async def _answer(scope: Scope, send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    pairs = {"content-type": "text/plain; charset=utf-8", **HEADERS, **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": [(name.encode(), value.encode()) for name, value in pairs.items()]})
    await send({"type": "http.response.body", "body": text.encode()})
