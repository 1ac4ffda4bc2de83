"""A picture by URL, without letting a caller reach what only this machine can reach.

A host is resolved once, every address it has is checked, and the connection goes to a checked address while Host, SNI
and certificate still speak of the host: a second answer of the DNS changes nothing. Each redirect goes through the same
again. No cookie, credential, proxy or trace of the caller leaves; what comes back is bytes, and the decoder alone says
whether they are a picture. Errors name the host and the reason, never a path or an address: they must not become a
way to look around. HTTP/1.1 by h11, which uvicorn brings.
"""

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from socket import SOCK_STREAM
from typing import NoReturn
from urllib.parse import quote, urljoin, urlsplit

import h11

from service.errors import BodyTooLarge, UrlFailed, UrlRefused
from service.settings import Settings

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
Check = Callable[[Address], bool]

OFF = "this service fetches nothing: send the picture's bytes, or start it with LIMNER_URL_INPUT=https"
UNREADABLE = "the URL cannot be read: is it like https://example.org/photo.jpg?"
DEFAULT_PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
MAX_URL = 2048
MAX_HEAD_BYTES = 32 * 2**10
MAX_ADDRESSES = 4  # tried one after the other; a name with more is odd
NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_.])?")
SAFE = "!$%&'()*+,/:;=?@[]~"

# https://www.iana.org/assignments/iana-ipv4-special-registry, and what stands there as reserved or multicast.
NOT_PUBLIC_4 = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # public by its number, yet every Azure machine's own agent
    )
)  # fmt: skip
# Of IPv6 only 2000::/3 is in public use. In it: protocol assignments with Teredo and ORCHID, and documentation.
PUBLIC_6 = ip_network("2000::/3")
NOT_PUBLIC_6 = tuple(ip_network(text) for text in ("2001::/23", "2001:db8::/32", "3fff::/20"))
NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Limits:
    schemes: tuple[str, ...] = ("https",)
    ports: tuple[int, ...] = (80, 443)
    max_bytes: int = 20 * 2**20
    total_s: float = 10
    connect_s: float = 5
    read_s: float = 5  # between two pieces
    max_redirects: int = 3


@dataclass(frozen=True, slots=True)
class Target:
    """Where one request goes. `host` is ASCII, an IPv6 address without its brackets."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def from_settings(settings: Settings) -> "Fetcher | None":
    """None where URL input is off."""
    if settings.url_input == "off":
        return None
    schemes = ("https", "http") if settings.url_input == "any" else ("https",)
    return Fetcher(Limits(schemes, settings.url_ports, settings.max_body_bytes, settings.url_seconds))


def is_public(address: Address) -> bool:
    """Whether it is a host on the internet, as far as its number tells; forms that carry an IPv4 address go by that."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in NOT_PUBLIC_4)
    if (carried := _carried(address)) is not None:
        return is_public(carried)
    return address in PUBLIC_6 and not any(address in network for network in NOT_PUBLIC_6)


def _carried(address: IPv6Address) -> IPv4Address | None:
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def parse(url: str, limits: Limits) -> Target:
    """What may be asked, by its letters alone; the address comes later."""
    if len(url) > MAX_URL or not url.isprintable() or any(letter in " \\" for letter in url):
        raise UrlRefused(f"the URL cannot be read: it must be at most {MAX_URL} characters, without spaces and \\")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UrlRefused(UNREADABLE) from None
    if parts.scheme not in limits.schemes:
        allowed = " or ".join(limits.schemes)
        raise UrlRefused(f"the URL's scheme must be {allowed}; LIMNER_URL_INPUT=any allows http too")
    try:
        host = _ascii(parts.hostname or "")
    except ValueError:
        raise UrlRefused(UNREADABLE) from None
    if "@" in parts.netloc:
        raise UrlRefused("the URL carries credentials: they are not passed on, so leave them out")
    port = DEFAULT_PORTS[parts.scheme] if port is None else port
    if port not in limits.ports:
        known = ", ".join(map(str, limits.ports))
        raise UrlRefused(f"host {host!r}: port {port} is not asked, only {known}; LIMNER_URL_PORTS sets them")
    query = f"?{parts.query}" if parts.query else ""
    return Target(parts.scheme, host, port, quote((parts.path or "/") + query, safe=SAFE))


def _ascii(host: str) -> str:
    """Raises ValueError (UnicodeError is one) for what names no host."""
    if ":" in host:
        return str(IPv6Address(host))
    host = host if host.isascii() else host.encode("idna").decode().lower()
    if not NAME.fullmatch(host):
        raise ValueError(host)
    return host


async def system_resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    return [str(info[4][0]) for info in found]


class Fetcher:
    """`resolve`, `check` and `context` are for tests, which have only their own machine to ask."""

    def __init__(
        self,
        limits: Limits,
        resolve: Resolve = system_resolve,
        check: Check = is_public,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._limits = limits
        self._resolve = resolve
        self._check = check
        self._context = context or ssl.create_default_context()

    async def fetch(self, url: str) -> bytes:
        """The bytes behind `url`, at most `max_bytes`, within `total_s` for all redirects together."""
        target = parse(url, self._limits)
        try:
            async with asyncio.timeout(self._limits.total_s):
                for _ in range(self._limits.max_redirects + 1):
                    found = await self._ask(target)
                    if isinstance(found, bytes):
                        return found
                    target = found
        except TimeoutError:
            _fail(target, f"the picture was not there after {self._limits.total_s:g} s; LIMNER_URL_SECONDS sets this")
        _fail(target, f"more than {self._limits.max_redirects} redirects")

    async def _ask(self, target: Target) -> bytes | Target:
        """One request: the body, or where it redirects to."""
        reader, writer = await self._connect(target, await self._addresses(target))
        try:
            exchange = _Exchange(target, reader, self._limits)
            writer.write(exchange.request())
            return await exchange.answer()
        except h11.RemoteProtocolError:
            _fail(target, "it broke off, or does not speak HTTP")
        except OSError:
            _fail(target, "the connection broke")
        finally:
            writer.transport.abort()  # nothing is left to say, and a peer may not make this wait

    async def _addresses(self, target: Target) -> list[Address]:
        """All of the host's addresses, if each one may be asked."""
        try:
            found = await self._resolve(target.host, target.port)
            addresses = [ip_address(text) for text in dict.fromkeys(found)]
        except (OSError, ValueError):
            _fail(target, "no such host")
        if not addresses:
            _fail(target, "no such host")
        if not all(self._check(address) for address in addresses):
            raise UrlRefused(f"host {target.host!r} may not be asked: it is not on the public internet")
        return addresses[:MAX_ADDRESSES]

    async def _connect(
        self, target: Target, addresses: list[Address]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        secure = {"ssl": self._context, "server_hostname": target.host} if target.scheme == "https" else {}
        for address in addresses:
            try:
                async with asyncio.timeout(self._limits.connect_s):
                    return await asyncio.open_connection(str(address), target.port, **secure)
            except ssl.SSLCertVerificationError:
                _fail(target, "its certificate is not valid for it")
            except OSError:  # TimeoutError is one; the next address may do
                continue
        _fail(target, "it cannot be reached")


class _Exchange:
    """One GET and its answer on an open connection."""

    def __init__(self, target: Target, reader: asyncio.StreamReader, limits: Limits) -> None:
        self._target = target
        self._reader = reader
        self._limits = limits
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    def request(self) -> bytes:
        headers = [
            ("Host", self._target.authority),
            ("User-Agent", "limner"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        head = self._http.send(h11.Request(method="GET", target=self._target.path, headers=headers))
        return (head or b"") + (self._http.send(h11.EndOfMessage()) or b"")

    async def answer(self) -> bytes | Target:
        head = await self._event()
        while isinstance(head, h11.InformationalResponse):
            head = await self._event()
        if not isinstance(head, h11.Response):
            _fail(self._target, "it gave no answer")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        if head.status_code in REDIRECTS and "location" in headers:
            return parse(urljoin(self._target.url, headers["location"]), self._limits)
        if head.status_code != 200:
            _fail(self._target, f"it answered {head.status_code}")
        if headers.get("content-encoding", "identity").lower() != "identity":
            _fail(self._target, "it compressed the picture though it was asked not to")
        return await self._body(headers.get("content-length", ""))

    async def _body(self, declared: str) -> bytes:
        body = bytearray()
        if declared.isdigit() and int(declared) > self._limits.max_bytes:
            self._too_large()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > self._limits.max_bytes:
                self._too_large()
        return bytes(body)

    async def _event(self) -> object:
        """h11's next event, a class of its own for each."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            try:
                async with asyncio.timeout(self._limits.read_s):
                    self._http.receive_data(await self._reader.read(65536))
            except TimeoutError:
                _fail(self._target, f"nothing came for {self._limits.read_s:g} s")
        return event

    def _too_large(self) -> NoReturn:
        most = self._limits.max_bytes
        told = f"the file exceeds {most} bytes: name a smaller one, or raise LIMNER_MAX_BODY_BYTES"
        raise BodyTooLarge(f"host {self._target.host!r}: {told}")


def _fail(target: Target, reason: str) -> NoReturn:
    raise UrlFailed(f"host {target.host!r}: {reason}")
