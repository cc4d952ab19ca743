"""Command lines taken apart."""

from owl.cli.arguments import changed, config_files, gather_options


def example(a: int, *, b: list[str] = [], c: float | None = None, d: int = 2) -> None:  # noqa: B006
    pass


def test_configurations_are_read_in_order_however_they_are_spelled() -> None:
    assert config_files(["--config=a", "--config", "b", "-c", "c", "--x", "d", "-c=e"]) == ["a", "b", "c", "e"]


def test_a_switch_takes_no_option_for_its_value() -> None:
    assert gather_options(["--dry_run", "-c", "a", "--fold", "b", "--trainer.x", "-1", "--name="]) == [
        *("--dry_run", "--fold", "b", "--name", ""),
        '--config=["a"]',
        '--options=["--trainer.x=-1"]',
    ]


def test_arguments_that_are_not_the_default_ones_are_named_in_order() -> None:
    assert changed(example, {"d": 2, "c": 0.0, "b": ["x"]}) == ["c", "b"]
    assert changed(example, {"a": None, "b": [], "c": None}) == ["a"]
