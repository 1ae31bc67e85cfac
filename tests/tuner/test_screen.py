"""When colours and bars are shown."""

import io

import pytest

from tuner.screen import colours, lively


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "on_terminal", "in_pipe"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": "", "FORCE_COLOR": "1"}, True, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
        ({"FORCE_COLOR": "0"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_colours(environment: dict[str, str], on_terminal: bool, in_pipe: bool) -> None:
    assert colours(Terminal(), environment) is on_terminal
    assert colours(io.StringIO(), environment) is in_pipe


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, True), ({"CI": "true"}, False), ({"CI": "false"}, True), ({"TERM": "dumb"}, False)],
)
def test_bars_move_only_on_a_terminal_that_is_no_log(
    environment: dict[str, str], expected: bool
) -> None:
    assert lively(Terminal(), environment) is expected
    assert lively(io.StringIO(), environment) is False
