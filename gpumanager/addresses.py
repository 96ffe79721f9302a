"""What an address says of where it is."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from urllib.parse import urlsplit


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether a host is surely this machine, by its address or the one name that stands for it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_and_port(url: str) -> tuple[str, int]:
    """Where a URL of HTTP leads; the host is empty if it names none. Raises ValueError."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


_METADATA = frozenset(
    ipaddress.ip_address(each)
    for each in (
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd20:ce::254",
    )
)
"""Where clouds tell a machine its own credentials."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")


def meant(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address that a packet to `address` ends at: IPv6 can wrap one of IPv4. Raises
    ValueError for what is no address."""
    given = ipaddress.ip_address(address)
    if given.version == 6:
        wrapped = given.ipv4_mapped or given.sixtofour
        if wrapped is None and given in _NAT64:
            wrapped = ipaddress.IPv4Address(int(given) & 0xFFFF_FFFF)
        return given if wrapped is None else wrapped
    return given


def why_never(address: str) -> str | None:
    """Why nothing is ever sent to an address on a client's word, whatever is listed; None where
    that is up to the list. Raises ValueError for what is no address."""
    where = meant(address)
    if where in _METADATA:
        return "a cloud's metadata service"
    if where.is_link_local:
        return "link-local"
    if where.is_multicast:
        return "multicast"
    if where.is_unspecified or (where.version == 4 and where in _THIS_NETWORK):
        return "unspecified"
    if where.is_reserved and not where.is_loopback:
        return "reserved"
    return None
