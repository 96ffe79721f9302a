"""How urgent a request says that it is: the `Priority` header of RFC 9218, a dictionary of
structured field values (RFC 9651)."""

from __future__ import annotations

import re

_KEY = r"[a-z*][a-z0-9_.*-]*+"
_NUMBER = r"-?(?:[0-9]{1,12}\.[0-9]{1,3}|[0-9]{1,15})(?![0-9.])"
_STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*+"'
_WORD = r"[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*+"
_BYTES = r":[A-Za-z0-9+/]*+=*+:"
_DATE = r"@-?[0-9]{1,15}(?![0-9.])"
_DISPLAYED = r'%"(?:[ !#$&-~]|%[0-9a-f]{2})*+"'
_BARE = rf"(?:{_NUMBER}|{_STRING}|{_WORD}|{_BYTES}|\?[01]|{_DATE}|{_DISPLAYED})"
_PARAMETERS = rf"(?:; *+{_KEY}(?:={_BARE})?+)*+"
_ITEM = rf"{_BARE}{_PARAMETERS}"
_LIST = rf"\( *+(?:{_ITEM}(?: ++|(?=\))))*+\)"
_MEMBER = rf"{_KEY}(?:=(?:{_LIST}|{_BARE}))?+{_PARAMETERS}"
_DICTIONARY = re.compile(rf" *+{_MEMBER}(?:[ \t]*+,[ \t]*+{_MEMBER})*+ *+")
"""Every repetition is possessive, so that it takes time in proportion to the header's length."""

_MEMBERS = re.compile(rf"(?P<key>{_KEY})(?:=(?P<value>{_LIST}|{_BARE}))?+{_PARAMETERS}")
_URGENCY = re.compile(r"0*[0-7]|-0+")


def urgency_of(header: str) -> int | None:
    """The urgency of a `Priority` header, 0 (most urgent) to 7; None where it says none. As the
    RFCs have it: of several `u` the last counts, one that is no integer from 0 to 7 counts as none,
    and a header that cannot be read is ignored as a whole."""
    if not _DICTIONARY.fullmatch(header):
        return None
    said = None
    for member in _MEMBERS.finditer(header):
        if member["key"] == "u":
            said = member["value"]
    return int(said) if said is not None and _URGENCY.fullmatch(said) else None
