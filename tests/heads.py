"""Request heads: well-formed ones with what they mean, malformed ones with the status that refuses them."""

from __future__ import annotations

import co2d

WELL_FORMED = [
    (b"GET / HTTP/1.0\r\n\r\n", ("GET", ("",))),
    (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", ("GET", ("",))),
    (b"GET /a/b%20c HTTP/1.1\r\nHost: a:8080\r\n\r\n", ("GET", ("a", "b c"))),
    (b"POST /ou/u/alive?site_code=a b HTTP/1.0\r\nHost: a\r\n\r\n", ("POST", ("ou", "u", "alive"))),
    ("POST /ou/u/alive?site_code=vadsø HTTP/1.0\r\n\r\n".encode(), ("POST", ("ou", "u", "alive"))),
    (b"POST /ou/u/alive?site_code=a HTTP/1.1 HTTP/1.0\r\nHost: a\r\n\r\n", ("POST", ("ou", "u", "alive"))),
    (b"GET http://example.org:80/a/b?c HTTP/1.1\r\nHost: example.org\r\n\r\n", ("GET", ("a", "b"))),
    (b"GET / HTTP/1.1\r\nHost: [::1]:8080\r\nX-Empty:\r\nX-Tab:\ta\tb \r\n\r\n", ("GET", ("",))),
    (b"PUT /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0000000005\r\nExpect: 100-Continue\r\n\r\n", ("PUT", ("x",))),
    (b"PUT /x HTTP/1.0\r\nExpect: 100-continue\r\n\r\n", ("PUT", ("x",))),
    (b"PUT /x HTTP/1.0\r\nExpect: 200-ok\r\n\r\n", ("PUT", ("x",))),
    (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", ("GET", ("",))),
]


def head(*lines):
    return b"GET / HTTP/1.1\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


HOST = b"Host: a"
MALFORMED = [
    (b"GET / HTTP/1.0\n\n", 400), (b"GET / HTTP/1.1\nHost: a\n\n", 400), (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
    (b"GET / HTTP/1.1\rHost: a\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", 400), (b"\r\nGET / HTTP/1.0\r\n\r\n", 400),
    (b"GET /\r\n", 400), (b"GET / \r\n", 400), (b"GET\r\n", 400), (b"/ HTTP/1.0\r\n", 400), (b" GET / HTTP/1.0\r\n", 400),
    (b"GET  / HTTP/1.0\r\n", 400), (b"GET /\tHTTP/1.0\r\n", 400), (b"GET\t/ HTTP/1.0\r\n", 400), (b"GET / HTTP/1.0 \r\n", 400),
    (b"GET / http/1.0\r\n", 400), (b"GET / HTTP/1\r\n", 400), (b"GET / HTTP/1.10\r\n", 400), (b"GET / HTTP/01.1\r\n", 400),
    (b"GET / HTTPS/1.1\r\n", 400), (b"GET / HTTP/2.0\r\n", 505), (b"GET / HTTP/0.9\r\n", 505), (b"GET / HTTP/1.2\r\n", 505),
    (b"G@T / HTTP/1.0\r\n", 400), (b"get / HTTP/1.0\r\n", 501), (b"PROPFIND / HTTP/1.0\r\n", 501), (b"GET x HTTP/1.0\r\n", 400),
    (b"GET * HTTP/1.0\r\n", 400), (b"CONNECT a:80 HTTP/1.1\r\n", 400), (b"GET http:///x HTTP/1.1\r\n", 400),
    (b"GET http://a\tb/x HTTP/1.1\r\n", 400), (b"GET http://a\xff\x01/x HTTP/1.1\r\n", 400),
    (b"GET ftp://a/x HTTP/1.1\r\n", 400), (b"GET /\x00 HTTP/1.0\r\n", 400), (b"GET /\x7f HTTP/1.0\r\n", 400),
    (b"GET /\x1b[2J HTTP/1.0\r\n", 400), (b"\x16\x03\x01\x02\x00\x01", 400), (b"PRI * HTTP/2.0\r\n", 400),
    (head(), 400), (head(HOST, HOST), 400), (head(b"Host: a", b"host: b"), 400), (head(b"Host: a b"), 400),
    (head(b"Host: a/b"), 400), (head(b"Host: a,b:x"), 400), (head(b"Host: user@a"), 400),
    (head(HOST, b"X : y"), 400), (head(HOST, b"X\t: y"), 400), (head(HOST, b" X: y"), 400), (head(HOST, b"X: y", b" folded"), 400),
    (head(HOST, b"X: y", b"\tfolded"), 400), (head(HOST, b"novalue"), 400), (head(HOST, b": y"), 400), (head(HOST, b"X\x00: y"), 400),
    (head(HOST, b"X: a\x00b"), 400), (head(HOST, b"X: a\x0bb"), 400), (head(HOST, b"X: a\x7fb"), 400), (head(HOST, b"X(y): z"), 400),
    (head(HOST, "Ü: z".encode()), 400), (head(HOST, b"\"X\": y"), 400),
    (head(HOST, b"Content-Length: 5", b"Content-Length: 5"), 400), (head(HOST, b"Content-Length: 5, 5"), 400),
    (head(HOST, b"Content-Length: +5"), 400), (head(HOST, b"Content-Length: -5"), 400), (head(HOST, b"Content-Length: 0x5"), 400),
    (head(HOST, b"Content-Length: 5 5"), 400), (head(HOST, b"Content-Length:"), 400), (head(HOST, b"Content-Length: 5.0"), 400),
    (head(HOST, b"Content-Length: 1_0"), 400), (head(HOST, b"Content-Length: 12345678901"), 400),
    (head(HOST, b"Content-Length: \xb2"), 400), (head(HOST, "Content-Length: ٣".encode()), 400),
    (head(HOST, b"Transfer-Encoding: chunked"), 501), (head(HOST, b"Transfer-Encoding: identity"), 501),
    (head(HOST, b"Transfer-Encoding:\tx, chunked"), 501), (head(HOST, b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400),
    (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (head(HOST, *[b"X: y"] * 64), 431), (head(HOST, b"X: " + b"y" * 8192), 431), (b"GET /" + b"x" * 8192, 414),
    (b"GET /" + b"x" * 8192 + b" HTTP/1.0\r\n\r\n", 431),
]


def parse(pieces):
    """What a connection does: feed pieces until the head is complete. The request, or None while it is not."""
    reader = co2d.RequestReader(max_body=65536)
    for piece in pieces:
        reader.feed(piece)
        if reader.request:
            return reader.request
    return None


def pieces_of(message, size):
    return [message[at:at + size] for at in range(0, len(message), size)]
