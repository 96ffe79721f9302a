"""Where callbacks may go."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gpumanager.addresses import why_never
from gpumanager.asyncjobs.targets import Targets, resolved
from gpumanager.config import ConfigError, parse_config
from tests.support.broker import config_for

LISTED = ("Hooks.example.org", "nas:8080", "*.hooks.example.com", "localhost:9000", "[::1]:9000")


def found(*addresses: str) -> Targets:
    def resolve(_host: str, _port: int) -> Sequence[str]:
        return addresses

    return Targets(LISTED, resolve)


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("https://hooks.example.org/done?of=a%20b", "hooks.example.org", 443, "/done?of=a%20b"),
        ("HTTPS://HOOKS.EXAMPLE.ORG:443", "hooks.example.org", 443, "/"),
        ("http://nas:8080/", "nas", 8080, "/"),
        ("https://a.b.hooks.example.com/x", "a.b.hooks.example.com", 443, "/x"),
        ("http://[::1]:9000/x", "::1", 9000, "/x"),
    ],
)
def test_what_is_listed_may_be_called(url: str, host: str, port: int, path: str) -> None:
    target = found().target(url)
    assert (target.host, target.port, target.path) == (host, port, path)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://example.org/", "its host example.org:443 is not listed"),
        ("https://nas/", "its host nas:443 is not listed"),
        ("https://hooks.example.org:8443/", "is not listed"),
        ("https://hooks.example.org.evil.org/", "is not listed"),
        ("https://hooks.example.com/", "is not listed"),
        ("https://evilhooks.example.com/", "is not listed"),
        ("http://127.0.0.1:9000/", "is not listed"),
        ("https://hooks.example.org@evil.org/", "neither a user"),
        ("https://me:secret@hooks.example.org/", "neither a user"),
        ("https://hooks.example.org/#part", "nor a fragment"),
        ("https://hooks.example.org:99999/", "port that is none"),
        ("https://evil.org\\.hooks.example.com/", "must be an http or https URL"),
        ("ftp://hooks.example.org/", "must be an http or https URL"),
        ("file:///etc/passwd", "must be an http or https URL"),
        ("https://hooks.example.org/\xe9", "must be an http or https URL"),
        ("https://hooks.example.org/" + "x" * 2048, "of at most 2048"),
        ("hooks.example.org", "must be an http or https URL"),
        ("", "must be an http or https URL"),
    ],
)
def test_what_is_not_listed_may_not(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        found().target(url)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("169.254.169.254", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("169.254.7.7", "link-local"),
        ("fe80::1%1", "link-local"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("::", "unspecified"),
        ("255.255.255.255", "reserved"),
        ("::ffff:169.254.169.254", "metadata"),
        ("::ffff:0.0.0.0", "unspecified"),
        ("2002:a9fe:a9fe::1", "metadata"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
    ],
)
def test_addresses_that_no_listed_name_may_lead_to(address: str, why: str) -> None:
    targets = found("93.184.216.34", address)
    with pytest.raises(ValueError, match=why):
        targets.addresses(targets.target("https://hooks.example.org/"))


def test_a_name_that_is_listed_may_be_private_one_below_it_may_not() -> None:
    targets = found("192.168.1.20")
    assert targets.addresses(targets.target("http://nas:8080/")) == ["192.168.1.20"]
    with pytest.raises(ValueError, match="private address"):
        targets.addresses(targets.target("https://x.hooks.example.com/"))


def test_loopback_only_where_it_is_listed_as_that() -> None:
    targets = found("127.0.0.1", "::1")
    for url in ("http://localhost:9000/", "http://[::1]:9000/"):
        assert targets.addresses(targets.target(url)) == ["127.0.0.1", "::1"]


def test_a_host_without_addresses_cannot_be_called() -> None:
    targets = found()
    with pytest.raises(OSError, match="no address"):
        targets.addresses(targets.target("http://nas:8080/"))


def test_no_more_than_a_few_addresses_are_tried() -> None:
    targets = found(*(f"93.184.216.{number}" for number in range(1, 9)))
    assert len(targets.addresses(targets.target("http://nas:8080/"))) == 4


def test_the_system_resolves_names() -> None:
    assert "127.0.0.1" in resolved("localhost", 80)
    assert resolved("127.0.0.1", 80) == ["127.0.0.1"]


def test_usual_addresses_are_up_to_the_list() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1::1", "10.0.0.1", "fd12::1", "127.0.0.1"):
        assert why_never(address) is None


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("169.254.169.254", "metadata"),
        ("[fe80::1]:80", "link-local"),
        ("http://nas", "must be a host name"),
        ("nas/path", "must be a host name"),
        ("*", "must be a host name"),
        ("a.*.org", "must be a host name"),
        ("nas:0", "must be a host name"),
        ("nas:65536", "must be a host name"),
        ("", "must be a host name"),
    ],
)
def test_the_config_takes_hosts_only(entry: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_config(config_for("http://127.0.0.1:1", jobs={"callbacks": [entry]}))
