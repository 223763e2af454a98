"""Who is answered: names, origins and tokens, for requests and for the websocket."""

import asyncio

import pytest

from posttrain.watch.guard import LOOPBACK, Guard

TOKEN = "s3cret"


async def page(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-page", b"yes")]})
    await send({"type": "http.response.body", "body": b"the page"})


def ask(headers, *, kind="http", path="/", query=b"", hosts=LOOPBACK, token=None):
    """(what was sent, status, headers of the answer)."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        raise AssertionError("nobody needs to read the request")

    scope = {"type": kind, "path": path, "query_string": query, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(Guard(page, hosts, token)(scope, receive, send))
    first = sent[0]
    return sent, first.get("status"), {name.decode(): value.decode() for name, value in first.get("headers", [])}


@pytest.mark.parametrize("host", ["127.0.0.1:8377", "localhost:8377", "[::1]:8377", "LocalHost"])
def test_this_machine_is_answered(host):
    sent, status, _ = ask({"host": host})
    assert (status, sent[1]["body"]) == (200, b"the page")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:8377",
        "127.0.0.1.evil.example",
        "localhost.evil.example:8377",
        "",
        "169.254.1.1",
        "evil.example#@localhost",
        "[::1",
        "[",
        "]::1[",
    ],
)
def test_a_name_that_was_made_to_point_here_is_refused(host):
    sent, status, _ = ask({"host": host})
    assert status == 403
    assert b"the page" not in sent[1]["body"]
    assert ask({"host": host}, kind="websocket")[0] == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:9999", "null", "https://127.0.0.1.evil.example:8377", "http://[::1"])
def test_another_site_is_refused_also_by_websocket(origin):
    assert ask({"host": "localhost:8377", "origin": origin})[1] == 403
    assert ask({"host": "localhost:8377", "origin": origin}, kind="websocket")[0] == [{"type": "websocket.close", "code": 1008}]


def test_the_page_itself_may_open_its_websocket():
    assert ask({"host": "localhost:8377", "origin": "http://localhost:8377"}, kind="websocket")[0] == [{"type": "websocket.accept"}]


def test_the_answer_binds_the_browser_to_this_server():
    _, _, headers = ask({"host": "localhost"})
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["connect-src"] == "'self'"
    assert "http" not in headers["content-security-policy"]
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-page"] == "yes"


def test_without_the_token_nothing_is_told():
    for headers in ({}, {"cookie": "posttrain_8377=wrong"}, {"cookie": "other=s3cret"}, {"cookie": "\x01;=;=s3cret"}):
        for query in (b"", b"token=wrong", b"token=", b"token=s3cret2"):
            sent, status, _ = ask({"host": "localhost:8377", **headers}, token=TOKEN, query=query)
            assert (status, b"the page" in sent[1]["body"]) == (401, False)
            assert ask({"host": "localhost:8377", **headers}, token=TOKEN, query=query, kind="websocket")[0][0]["type"] == "websocket.close"


def test_the_token_leaves_the_address_and_stays_as_a_cookie():
    _, status, headers = ask({"host": "localhost:8377"}, token=TOKEN, query=b"step=3&token=s3cret&run=a%20b", path="/")
    assert (status, headers["location"]) == (303, "/?step=3&run=a+b")
    cookie, *rules = headers["set-cookie"].split("; ")
    assert set(rules) == {"HttpOnly", "SameSite=Strict", "Path=/"}
    assert ask({"host": "localhost:8377", "cookie": cookie}, token=TOKEN)[1] == 200
    assert ask({"host": "localhost:8377", "cookie": f"a=b; {cookie}"}, token=TOKEN, kind="websocket")[0] == [{"type": "websocket.accept"}]
    assert ask({"host": "localhost:8378", "cookie": cookie}, token=TOKEN)[1] == 401  # another server on the same machine
    assert ask({"host": "localhost:8377"}, token=TOKEN, query=b"token=s3cret", kind="websocket")[0][0]["type"] == "websocket.close"


def test_beyond_this_machine_any_name_will_do_but_not_without_the_token():
    assert ask({"host": "gpu7.lan:80"}, hosts=None, token=TOKEN)[1] == 401
    assert ask({"host": "gpu7.lan:80"}, hosts=None, token=TOKEN, query=b"token=s3cret")[1] == 303
