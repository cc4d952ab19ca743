"""Private names of Python's standard library."""

import multiprocessing
from argparse import ArgumentParser
from multiprocessing import queues
from threading import Event
from typing import Any

import pytest

from tests.contracts.contract import contract


@contract(
    "_on_queue_feeder_error", needed_by="owl/data/failures.py: a loader's worker that cannot send a batch says so"
)
def test_a_queue_hands_over_what_it_could_not_send(monkeypatch: pytest.MonkeyPatch) -> None:
    called, given = Event(), []

    def hook(*arguments: Any) -> None:
        given.extend(arguments)
        called.set()

    monkeypatch.setattr(queues.Queue, "_on_queue_feeder_error", hook)
    queue = multiprocessing.Queue()
    item = (3, lambda: None)  # which cannot be pickled
    queue.put(item)
    assert called.wait(60)
    assert given[0] is queue
    assert isinstance(given[1], Exception)
    assert given[2] is item
    queue.close()


@contract(
    *("_actions", "_option_string_actions"),
    needed_by="owl/cli and owl/__main__.py: the options that help and suggestions name",
)
def test_a_parser_knows_its_options() -> None:
    parser = ArgumentParser()
    action = parser.add_argument("--name", "-n")
    assert action in parser._actions
    assert parser._option_string_actions["--name"] is action
