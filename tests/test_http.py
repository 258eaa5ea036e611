"""The client that teacher and judge share, against a server on the loopback that behaves as badly as servers do."""

import asyncio
import gzip
import json
import logging
import math
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from grkd_trl.teacher.http import ServerClient, ServerError, ServerRequest, UnusableAnswer


KEY = "sk-not/to be+seen"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, body, self.headers["Authorization"]))
        behaviour = self.server.behaviours.pop(0) if self.server.behaviours else answer()
        try:
            behaviour(self)
        except (BrokenPipeError, ConnectionResetError):  # a client that did not wait
            pass

    do_GET = do_POST


def answer(status=200, content=b'{"ok": 1}', **headers):
    def behaviour(handler):
        handler.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return behaviour


def trickle(handler):
    """Each byte comes in time, and the whole never."""
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(0.02)


def trickle_content(handler):
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def stream(handler):
    """More than is asked for, without saying how much."""
    handler.send_response(200)
    handler.send_header("transfer-encoding", "chunked")
    handler.end_headers()
    for _ in range(2000):
        handler.wfile.write(b"1000\r\n" + b" " * 4096 + b"\r\n")


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *args: None
    server.requests, server.behaviours = [], []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, *behaviours, number=1, read=dict, amend=None, host="127.0.0.1", **kwargs):
    server.behaviours[:] = behaviours
    url = f"http://{host}:{server.server_port}/v1"
    client = ServerClient(
        url, **{"who": "judge", "key": KEY, "timeout": 5.0, "max_retries": 2, "backoff": 0.01} | kwargs
    )
    return client.post_all([ServerRequest("/completions", {"number": i}, read, amend) for i in range(number)])


class TestAttempts:
    @pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
    def test_are_repeated_where_that_may_help(self, server, status):
        assert ask(server, answer(status), answer(status)) == [{"ok": 1}]
        assert len(server.requests) == 3

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
    def test_a_refused_request_is_not_repeated(self, server, status):
        with pytest.raises(
            ServerError, match=f"The judge at .*/v1/completions failed, status {status}: .*not repeated"
        ):
            ask(server, answer(status, b"no"))
        assert len(server.requests) == 1

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
    def test_what_is_no_json_object_is_repeated(self, server, content):
        assert ask(server, answer(content=content)) == [{"ok": 1}]
        with pytest.raises(ServerError, match="malformed answer: .*Giving up after 3 attempts"):
            ask(server, *[answer(content=content)] * 3)

    def test_what_the_reader_cannot_use_is_repeated(self, server):
        def read(given):
            if "usable" not in given:
                raise UnusableAnswer("not that")
            return given["usable"]

        assert ask(server, answer(), answer(content=b'{"usable": 2}'), read=read) == [2]

    def test_a_body_is_amended_where_the_server_refuses_it(self, server):
        amend = lambda body, text: body | {"amended": text} if "amended" not in body else None  # noqa: E731
        assert ask(server, answer(400, b"no number"), amend=amend) == [{"ok": 1}]
        assert json.loads(server.requests[1][1]) == {"number": 0, "amended": "no number"}
        with pytest.raises(ServerError, match="status 400: no number"):
            ask(server, *[answer(400, b"no number")] * 2, amend=amend)

    @pytest.mark.parametrize("text", ["a\ud83d", "\u2028", "\x00", "é"])
    def test_any_text_can_be_sent(self, server, text):
        client = ServerClient(f"http://127.0.0.1:{server.server_port}/v1", who="judge")
        client.post_all([ServerRequest("/completions", {"text": text}, dict)])
        assert json.loads(server.requests[0][1]) == {"text": text}

    def test_results_are_in_the_order_of_the_requests(self, server):
        def echo(handler):
            number = json.loads(server.requests[-1][1])["number"] if len(server.requests) > 1 else 0
            time.sleep(0.05 * (number % 3))
            answer(content=json.dumps({"n": number}).encode())(handler)

        assert [given["n"] for given in ask(server, *[echo] * 7, number=7, max_concurrency=1)] == list(range(7))

    def test_nothing_is_sent_after_an_error(self, server):
        with pytest.raises(ServerError, match="status 401"):
            ask(server, answer(), answer(401), number=9, max_concurrency=1)
        assert len(server.requests) == 2

    def test_within_a_running_event_loop(self, server):
        async def notebook():
            return ask(server, number=3)

        assert asyncio.run(notebook()) == [{"ok": 1}] * 3


class TestWaits:
    @pytest.mark.parametrize(
        "name, value",
        [
            ("retry_after", lambda: "0.4"),
            ("retry_after_ms", lambda: "400"),
            ("retry_after", lambda: formatdate(time.time() + 2, usegmt=True)),  # to the second
        ],
    )
    def test_as_the_server_asks(self, server, name, value):
        start = time.monotonic()
        ask(server, answer(429, **{name: value()}))
        assert 0.4 <= time.monotonic() - start < 4

    @pytest.mark.parametrize("value", ["soon", "nan", "inf", "-5", "Thu, 01 Jan 1970 00:00:00 GMT"])
    def test_what_cannot_be_waited_for_is_ignored(self, server, value):
        start = time.monotonic()
        assert ask(server, answer(503, retry_after=value)) == [{"ok": 1}]
        assert time.monotonic() - start < 2

    def test_an_hour_ends_the_run(self, server):
        with pytest.raises(ServerError, match="asks for a wait of 3600 s"):
            ask(server, answer(429, retry_after="3600"))
        assert len(server.requests) == 1


class TestLimits:
    @pytest.mark.parametrize("slow", [trickle, trickle_content])
    def test_the_deadline_holds_for_the_whole_answer(self, server, slow):
        start = time.monotonic()
        with pytest.raises(ServerError, match="no complete answer within 0.3 s"):
            ask(server, slow, timeout=0.3, max_retries=0)
        assert time.monotonic() - start < 2

    @pytest.mark.parametrize(
        "large",
        [
            answer(content=b" " * 100_001),
            answer(content=gzip.compress(b" " * 50_000_000), content_encoding="gzip"),
            stream,
        ],
    )
    def test_an_answer_is_not_read_without_end(self, server, large):
        with pytest.raises(ServerError, match="an answer of more than 100000 bytes.*not repeated"):
            ask(server, large, max_answer_bytes=100_000)
        assert len(server.requests) == 1

    def test_an_answer_of_the_limit_is_read(self, server):
        content = b'{"ok": 1}'.ljust(100_000)
        assert ask(server, answer(content=content), max_answer_bytes=100_000) == [{"ok": 1}]


class TestRedirects:
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_to_another_host_are_refused(self, server, status):
        """`localhost` is another host than `127.0.0.1`, and the server counts what reaches it."""
        target = f"http://localhost:{server.server_port}/v1/completions?key=secret"
        with pytest.raises(ServerError, match=r"a redirect to http://localhost:\d+/v1/completions\. Prompts and key"):
            ask(server, answer(status, location=target))
        assert len(server.requests) == 1

    def test_to_another_port_are_refused(self, server):
        with pytest.raises(ServerError, match="a redirect to http://127.0.0.1:9/"):
            ask(server, answer(307, location="http://127.0.0.1:9/v1/completions"))

    @pytest.mark.parametrize("status", [307, 308])
    def test_within_the_host_are_followed(self, server, status):
        assert ask(server, answer(status, location="/v2/completions")) == [{"ok": 1}]
        assert [(path, json.loads(body), key) for path, body, key in server.requests] == [
            (path, {"number": 0}, f"Bearer {KEY}") for path in ("/v1/completions", "/v2/completions")
        ]

    def test_that_would_lose_the_body_are_refused(self, server):
        with pytest.raises(ServerError, match="status 302: a redirect"):
            ask(server, answer(302, location="/v2/completions"))

    def test_have_an_end(self, server):
        with pytest.raises(ServerError, match="redirects in a row"):
            ask(server, *[answer(307, location="/v1/completions")] * 9)


class TestKey:
    @pytest.mark.parametrize("echo", [KEY, json.dumps({"k": KEY}), "sk-not%2Fto%20be%2Bseen"])
    @pytest.mark.parametrize("before", [0, 290, 297])
    def test_is_masked_where_the_server_echoes_it(self, server, caplog, echo, before):
        """Also where the text is shortened within it."""
        caplog.set_level(logging.DEBUG)
        for status in (400, 500):
            content = b"x" * before + echo.encode()
            with pytest.raises(ServerError) as error:
                ask(server, *[answer(status, content)] * 3)
            shown = f"{error.value} {caplog.text}"
            assert "not/to" not in shown and "sk-" not in shown and "not%2F" not in shown
            assert error.value.__cause__ is None and error.value.__context__ is None

    def test_of_the_address_is_not_shown(self, server):
        url = f"http://me:my-password@127.0.0.1:{server.server_port}/v1?key=another-secret"
        client = ServerClient(url, who="teacher", max_retries=0)
        server.behaviours[:] = [answer(401, b"my-password is wrong")]
        with pytest.raises(ServerError) as error:
            client.post_all([ServerRequest("/completions", {}, dict)])
        assert server.requests[0][0] == "/v1/completions?key=another-secret"
        assert "my-password" not in str(error.value) and "another-secret" not in str(error.value)

    def test_is_sent_without_the_line_break_of_its_file(self, server):
        ask(server, key="sk-key\n")
        assert server.requests[0][2] == "Bearer sk-key"

    def test_is_refused_where_no_header_holds_it(self):
        with pytest.raises(ValueError, match="key holds characters") as error:
            ServerClient("http://localhost", who="judge", key="sk-ключ")
        assert "sk-" not in str(error.value)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "", "http://", "/v1"])
def test_addresses(url):
    with pytest.raises(ValueError, match="`base_url`"):
        ServerClient(url, who="teacher")


@pytest.mark.parametrize(
    "kwargs", [{"max_concurrency": 0}, {"max_retries": -1}, {"timeout": 0}, {"timeout": math.nan}, {"backoff": -1}]
)
def test_ranges(kwargs):
    with pytest.raises(ValueError, match="must be 1 or above"):
        ServerClient("http://localhost", who="teacher", **kwargs)


@pytest.mark.parametrize(
    "url, local",
    [
        ("http://localhost:1/v1", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:8/v1", True),
        ("https://x.org", False),
    ],
)
def test_local_servers(url, local):
    assert ServerClient(url, who="judge").is_local() is local
