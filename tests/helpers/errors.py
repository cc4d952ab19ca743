"""What every error must be: its code, the values that it is about, and one sentence that says what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from owl.errors import OwlError


@contextmanager
def refused(code: str, *tokens: str) -> Iterator[None]:
    """Expect an OwlError of this code whose sentence holds every token: a file, a key, a number, a nearest name.

    Tokens are what was found and what was expected, never prose, so that the sentence may be reworded.
    """
    with pytest.raises(OwlError) as caught:
        yield
    check_error(caught.value, code, *tokens)


def check_error(error: BaseException, code: str, *tokens: str) -> None:
    """As ``refused``, for an error that was caught or kept."""
    assert isinstance(error, OwlError), repr(error)
    check_sentence(str(error), error.code, code, *tokens)


def check_line(line: str, code: str, *tokens: str) -> None:
    """As ``refused``, for the line that ``python -m owl`` printed: ``owl: error: sentence [code]``."""
    found = re.fullmatch(r"owl: error: (.+) \[([a-z0-9.-]+)\]", line)
    assert found, line
    check_sentence(found[1], found[2], code, *tokens)


def check_sentence(sentence: str, found: str, code: str, *tokens: str) -> None:
    """Check an error that was taken apart."""
    assert found == code, sentence
    for token in tokens:
        assert token in sentence, f"{token!r} is not in {sentence!r}"
    own, within = sentence, 1
    while within:  # what another library said stands in parentheses, and may be any number of sentences
        own, within = re.subn(r"\([^()]*\)", "", own)
    assert "\n" not in sentence, sentence
    assert not own.endswith("."), sentence
    assert not re.search(r"[.!] [A-Z]", own), sentence
    assert re.search(r"; |expect|did you mean", own) or "(accepted: " in sentence, (
        f"{sentence!r} does not say what to do"
    )
