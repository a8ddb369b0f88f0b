"""Pictures by http(s), fetched once into the cache, from public addresses only.

    url ── hop by hop: resolve, check every address, connect to the one that was checked ──▶ cache/urls/<sha256 of url>

A host name is looked up once per hop and the connection goes to that very address, so that a name which changes its
answer between the check and the connection (DNS rebinding) gains nothing. Proxies of the environment are not used: they
would look the name up themselves.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import ipaddress
import socket
import ssl
import time
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from filelock import FileLock

from rankwise.data.pixels import is_picture
from rankwise.data.sources.archives import cache
from rankwise.files.atomic import atomic_write

LARGEST = 64 * 2**20  # bytes of one picture
TIMEOUT = 20.0  # seconds to connect, and between two blocks
LONGEST = 120.0  # seconds for one picture, however slowly its blocks arrive
MOST_REDIRECTS = 5
BLOCK = 2**16
SHOWN = 80  # bytes of what is no picture, in a message
REDIRECTS = {301, 302, 303, 307, 308}
HEADERS = {"User-Agent": "rankwise", "Accept": "image/*", "Accept-Encoding": "identity"}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses as an IPv6 network reaches them (RFC 6052)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Refused(Exception):
    """Why a URL was not fetched."""


def fetched(url: str) -> Path:
    """The file of the cache that holds the picture that the URL gave; it is asked once. Raises Refused, also for what
    is no picture: an error page with status 200 is not kept, and asked for again."""
    file = cache() / "urls" / hashlib.sha256(url.encode()).hexdigest()
    if file.is_file() and is_picture(file):
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file() or not is_picture(file):
            content = _content(url)
            if not is_picture(io.BytesIO(content)):
                raise Refused(f"is no picture: the server sent {content[:SHOWN].decode('utf-8', 'replace')!r}")
            with atomic_write(file) as temporary:
                temporary.write_bytes(content)
    return file


def _content(url: str) -> bytes:
    deadline = time.monotonic() + LONGEST
    for _ in range(MOST_REDIRECTS + 1):
        connection, target = _connection(url)
        try:
            connection.request("GET", target, headers=HEADERS)
            answer = connection.getresponse()
            location = answer.getheader("Location")
            if answer.status not in REDIRECTS or not location:
                return _body(answer, deadline)
            url = urljoin(url, location)
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"could not be fetched ({type(error).__name__}: {error})") from error
        finally:
            connection.close()
    raise Refused(f"is redirected more than {MOST_REDIRECTS} times")


def _body(answer: http.client.HTTPResponse, deadline: float) -> bytes:
    if answer.status != 200:
        raise Refused(f"could not be fetched: the server answered {answer.status} {answer.reason}")
    blocks, arrived = [], 0
    while block := answer.read(BLOCK):
        blocks.append(block)
        arrived += len(block)
        if arrived > LARGEST:
            raise Refused(f"has more than {LARGEST:,} bytes")
        if time.monotonic() > deadline:
            raise Refused(f"did not arrive within {LONGEST:.0f} seconds")
    if answer.length:
        raise Refused(f"was cut: {answer.length:,} bytes did not arrive")
    return b"".join(blocks)


def _connection(url: str) -> tuple[http.client.HTTPConnection, str]:
    """A connection to the checked address, and what to ask it for."""
    parts = _checked(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    assert parts.hostname
    address = public_address(parts.hostname, port)
    kind = _PinnedTls if parts.scheme == "https" else _Pinned
    query = f"?{parts.query}" if parts.query else ""
    return kind(parts.hostname, port, address), (parts.path or "/") + query


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise Refused(f"is no URL ({error})") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(f"leads to {url!r:.80}, which is no http(s) URL")
    if parts.username or parts.password:
        raise Refused("carries a user name or password; pictures are fetched without")
    if not url.isascii() or any(character <= " " for character in url):
        raise Refused("has characters that a URL must not have; percent-encode them")
    return parts


def public_address(host: str, port: int) -> str:
    """An address of the host. Refused unless all its addresses are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Refused(f"could not be fetched: the host {host} is not known ({error})") from error
    addresses = [str(entry[4][0]) for entry in found]
    inside = [address for address in addresses if not is_public(address)]
    if inside:
        raise Refused(f"leads to {host} at {inside[0]}, which is no public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is one of the internet's: not private, loopback, link-local, multicast or reserved."""
    ip = _unwrapped(ipaddress.ip_address(address.split("%")[0]))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_loopback)


def _unwrapped(ip: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, where it stands for one."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip


class _Pinned(http.client.HTTPConnection):
    """Connects to an address that was checked, and speaks to the host of the URL."""

    def __init__(self, host: str, port: int, address: str) -> None:
        super().__init__(host, port, timeout=TIMEOUT)
        self.address = address

    def connect(self) -> None:
        self.sock = socket.create_connection((self.address, self.port), TIMEOUT)


class _PinnedTls(_Pinned):
    """The same by https: the certificate must be the host's."""

    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
