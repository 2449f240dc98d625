"""One HTTP connection on the standard library: kept open, with a deadline for the whole exchange, and proxies.

Why not a client library: the one that came with huggingface_hub changed under its releases (httpx, then httpx2), and
this needs little: JSON out, JSON back. Redirects are not followed, so that a key goes to the named host only.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message

from inranker_jax.query_generation.secret import check_url

MAX_BODY = 16 * 2**20
# What OpenSSL's releases call an answer in plain HTTP.
_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"})


class TransportError(Exception):
    """No whole answer came: refused, reset, timed out, cut short.

    Attributes:
      hopeless: another attempt will end the same way.
      reached: there was a connection; without one, the request is not to blame.
      turned_away: nothing speaks this protocol there, as with a mistyped URL: the connection was refused, the
        host is unknown, or TLS failed.
    """

    def __init__(
        self, reason: str, hopeless: bool = False, reached: bool = True, turned_away: bool = False
    ) -> None:
        super().__init__(reason)
        self.hopeless = hopeless
        self.reached = reached
        self.turned_away = turned_away


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP answer."""

    status: int
    reason: str
    headers: Message
    body: bytes


@dataclass(frozen=True)
class Address:
    """Where requests go: the parts of an endpoint's URL.

    Attributes:
      scheme: "http" or "https".
      host, port: of the server.
      path: without a slash at its end.
      query: "?..." or "", sent and never shown.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> Address:
        """Parses a URL.

        Raises:
          InputError: see `secret.check_url`.
        """
        parts = check_url(url)
        query = f"?{parts.query}" if parts.query else ""
        default = 443 if parts.scheme == "https" else 80
        return cls(parts.scheme, parts.hostname or "", parts.port or default, parts.path.rstrip("/"), query)

    @property
    def url_host(self) -> str:
        """The host as it stands in a URL: an IPv6 address in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def shown(self) -> str:
        """The URL as messages and files show it."""
        default = 443 if self.scheme == "https" else 80
        return f"{self.scheme}://{self.url_host}{'' if self.port == default else f':{self.port}'}{self.path}"


class Connection:
    """Sends requests one after another over one connection; every thread has its own.

    Args:
      address: the server; `path` is put before the path of every request.
      headers: sent with every request.
      timeout: seconds for a whole exchange, from connecting to the last byte.
    """

    def __init__(self, address: Address, headers: Mapping[str, str], timeout: float) -> None:
        self._address = address
        self._headers = dict(headers)
        self._timeout = timeout
        self._connection: http.client.HTTPConnection | None = None
        self._prefix = ""

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        before_resend: Callable[[], None] = lambda: None,
    ) -> Reply:
        """One exchange.

        Args:
          method, path, body: of the request.
          before_resend: called when the request is about to be sent a second time, since the server had closed the
            kept connection; may raise to prevent it.

        Raises:
          TransportError: no whole answer came. The message holds nothing that the server sent.
        """
        deadline = time.monotonic() + self._timeout
        reused = self._connection is not None
        try:
            return self._exchange(method, path, body, deadline)
        except (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError) as error:
            # A server may close a kept connection at any time: that says nothing about the request.
            if not reused or time.monotonic() >= deadline:
                raise self._failed(error) from None
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise self._failed(error) from None
        self.close()
        before_resend()
        try:
            return self._exchange(method, path, body, deadline)
        except (http.client.HTTPException, OSError, ValueError) as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> TransportError:
        """Closes the connection; returns what to raise."""
        reached = self._connection is not None
        self.close()
        hopeless = isinstance(error, ssl.SSLCertVerificationError)
        turned_away = not reached and isinstance(
            error, ConnectionRefusedError | socket.gaierror | ssl.SSLError
        )
        return TransportError(_reason(error, self._timeout), hopeless, reached, turned_away)

    def _exchange(self, method: str, path: str, body: bytes | None, deadline: float) -> Reply:
        connection = self._open()
        remaining = max(0.001, deadline - time.monotonic())
        expired = threading.Event()
        sock = connection.sock
        assert sock is not None
        sock.settimeout(remaining)

        def expire() -> None:
            # The socket's own timeout starts anew with every byte; a server that dribbles would hold on for ever.
            expired.set()
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(remaining, expire)
        timer.daemon = True
        timer.start()
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(
                method,
                f"{self._prefix}{self._address.path}{path}{self._address.query}",
                body,
                self._headers | headers,
            )
            response = connection.getresponse()
            data = response.read(MAX_BODY + 1)
            if len(data) > MAX_BODY:
                raise http.client.HTTPException(f"an answer of more than {MAX_BODY >> 20} MiB")
            if not response.isclosed():
                response.read()  # nothing is left, or it raises: a bounded read does not tell a body cut short
            if response.will_close:
                self.close()
            return Reply(response.status, response.reason, response.headers, data)
        except (http.client.HTTPException, OSError):
            if expired.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()

    def _open(self) -> http.client.HTTPConnection:
        if self._connection is not None and self._connection.sock is not None:
            return self._connection
        address = self._address
        proxy = _proxy(address)
        host, port = (address.host, address.port) if proxy is None else (proxy.host, proxy.port)
        if address.scheme == "https":
            context = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=self._timeout, context=context
            )
            if proxy is not None:
                connection.set_tunnel(address.host, address.port, headers=proxy.headers)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._timeout)
            if proxy is not None:
                self._prefix = f"http://{address.url_host}:{address.port}"
                self._headers |= proxy.headers
        connection.connect()
        self._connection = connection
        return connection

    def close(self) -> None:
        """Closes the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@dataclass(frozen=True)
class _Proxy:
    host: str
    port: int
    headers: dict[str, str] = field(repr=False)


def _proxy(address: Address) -> _Proxy | None:
    """The proxy that `http_proxy`, `https_proxy` and `no_proxy` choose, as for other programs."""
    chosen = urllib.request.getproxies().get(address.scheme)
    if not chosen or urllib.request.proxy_bypass(address.host):
        return None
    parts = urllib.parse.urlsplit(chosen if "://" in chosen else f"http://{chosen}")
    headers = {}
    if parts.username:
        user = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    return _Proxy(parts.hostname or "", parts.port or 80, headers)


def _reason(error: Exception, timeout: float) -> str:
    """What went wrong in words, and without the server's: exceptions of http.client quote what it sent."""
    if isinstance(error, TimeoutError):
        return f"no whole answer within {timeout:g} s"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut short"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the server closed the connection without an answer"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted ({error.verify_message})"
    if isinstance(error, ssl.SSLError) and error.reason in _NOT_TLS:
        return f"the server does not speak TLS ({error.reason}): one without it has a URL with http://"
    if isinstance(error, socket.gaierror):
        return "the host name is not known"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return f"not a whole HTTP answer ({type(error).__name__})"
