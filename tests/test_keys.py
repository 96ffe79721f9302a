"""Keys: where they are read from, and what is said when they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumanager.keys import ApiKey, KeysError, load_callback_secret, load_keys

LONG = "0123456789abcdef"


def test_keys_from_the_environment_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        f"# the household\nalice {LONG}a max_queued=2  # phone\n\nbob {LONG}b role=client\n"
        f"nightly {LONG}e urgency=6 most_urgent=4\n"
    )
    environ = {"GPUMANAGER_API_KEYS": f"ci {LONG}c; cron {LONG}d role=admin max_queued=1"}
    assert load_keys(environ, str(file)) == (
        ApiKey("ci", f"{LONG}c"),
        ApiKey("cron", f"{LONG}d", 1, "admin"),
        ApiKey("alice", f"{LONG}a", 2),
        ApiKey("bob", f"{LONG}b", role="client"),
        ApiKey("nightly", f"{LONG}e", urgency=6, most_urgent=4),
    )


def test_without_any_there_are_none() -> None:
    assert load_keys({}, None) == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alice", "NAME KEY"),
        (f"alice {LONG} max_queued=2 more", "after the key"),
        (f"alice {LONG} role=root", "admin or client"),
        (f"alice {LONG} role=", "admin or client"),
        (f"alice {LONG} role=client role=admin", "role is given twice"),
        (f"alice {LONG} max_queued=1 max_queued=2", "max_queued is given twice"),
        (f"al/ice {LONG}", "NAME KEY"),
        ("alice short", "at least 16"),
        (f"alice {LONG} max_queued=0", "max_queued=N"),
        (f"alice {LONG} fast", "max_queued=N"),
        (f"alice {LONG} urgency=8", "urgency=N wants a number from 0"),
        (f"alice {LONG} most_urgent=", "most_urgent=N wants a number from 0"),
        (f"alice {LONG} urgency=+1", "urgency=N wants a number from 0"),
        (f"alice {LONG} urgency=1 urgency=2", "urgency is given twice"),
        (f"alice {LONG} urgency=3 most_urgent=4", "urgency=3 is more urgent than most_urgent=4"),
        (f"alice {LONG};alice {LONG}x", "two keys"),
    ],
)
def test_a_bad_entry_is_named_by_its_place_and_never_shown(line: str, words: str) -> None:
    with pytest.raises(KeysError, match=words) as refused:
        load_keys({"GPUMANAGER_API_KEYS": line}, None)
    assert LONG not in str(refused.value)
    assert "short" not in str(refused.value)


def test_a_file_that_is_missing_empty_or_binary_lets_nobody_in(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="No such file"):
        load_keys({}, str(tmp_path / "none"))
    empty = tmp_path / "empty"
    empty.write_text("# later\n")
    with pytest.raises(KeysError, match="holds no key"):
        load_keys({}, str(empty))
    empty.write_bytes(b"\xff\xfe")
    with pytest.raises(KeysError, match="UTF-8"):
        load_keys({}, str(empty))


def test_a_key_does_not_show_itself() -> None:
    assert LONG not in repr(ApiKey("alice", LONG))


# -- what callbacks are signed with --------------------------------------------------------------

ENCODED = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3"
SIGNS = b"0123456789abcdef01234567"


def test_the_secret_of_the_environment_comes_before_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{ENCODED}\n")
    assert load_callback_secret({}, str(file), wanted=True) == SIGNS
    environ = {"GPUMANAGER_CALLBACK_SECRET": "whsec_" + "A" * 32}
    assert load_callback_secret(environ, str(file), wanted=True) == bytes(24)
    assert load_callback_secret(environ, str(file), wanted=False) is None


@pytest.mark.parametrize(
    "text",
    ["secret", "whsec_", "whsec_c2hvcnQ=", "whsec_" + "A" * 88, "whsec_!!!!" + "A" * 32,
     ENCODED.removeprefix("whsec_")],
)  # fmt: skip
def test_a_secret_that_is_none_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(KeysError, match="must be whsec_ and 24 to 64 bytes in base64") as caught:
        load_callback_secret({"GPUMANAGER_CALLBACK_SECRET": text}, None, wanted=True)
    assert len(text) < 8 or text not in str(caught.value)


def test_callbacks_want_a_secret(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="no secret to sign with: set GPUMANAGER_CALLBACK_SECRET"):
        load_callback_secret({}, None, wanted=True)
    with pytest.raises(KeysError, match="No such file"):
        load_callback_secret({}, str(tmp_path / "none"), wanted=True)
    (tmp_path / "odd").write_bytes(b"\xff")
    with pytest.raises(KeysError, match="not ASCII"):
        load_callback_secret({}, str(tmp_path / "odd"), wanted=True)
