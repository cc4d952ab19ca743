"""Numbers as text."""

from owl.viz.numbers import format_number


def test_numbers_are_short() -> None:
    assert [format_number(value) for value in (3, 48.0, 26.51234, 0.00012345)] == ["3", "48", "26.51", "0.0001234"]
    assert format_number(float("inf")) == "inf"
    assert format_number(float("nan")) == "nan"
