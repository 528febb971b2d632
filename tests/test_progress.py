"""Progress: bars on a terminal, one inside the other; a line every so often in a log; nothing for short loops."""

import io
import sys

import pytest

from structkd import progress
from structkd.text import rate_text, time_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_short_loop_leaves_no_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track(range(5), "short")) == list(range(5))
    assert capsys.readouterr().err == ""


def test_a_long_loop_says_count_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(progress.track(range(5), "long")) == list(range(5))
    # the clock reads 0 at the start and 40, 80, ... after each item; the last item has no line
    assert capsys.readouterr().err.splitlines() == [
        "long: 2 of 5, 0:02:00 left, 40.0 s each",
        "long: 4 of 5, 0:00:40 left, 40.0 s each",
    ]
    assert list(progress.track(range(5), "own", lines=False)) == list(range(5))
    assert list(progress.track(iter(range(4)), "unknown length")) == list(range(4))
    assert "unknown length: 2, 40.0 s each" in capsys.readouterr().err


def test_bars_stand_inside_each_other_and_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    seen = []
    for outer in progress.track(range(2), "seeds"):
        for inner in progress.track(range(3), "epochs"):
            seen.append((outer, inner))
            if outer == 1 and inner == 1:
                break
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert progress._open == []
    broken = progress.track((1 // (1 - at) for at in range(3)), "failing")
    with pytest.raises(ZeroDivisionError):
        list(broken)
    assert list(progress.track([1], "again")) == [1]


def test_a_late_bar_waits_and_then_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress.track(range(5), "search", late=True)) == list(range(5))
    assert terminal.getvalue() == ""  # over before half a second
    monkeypatch.setattr(progress, "LATE_SECONDS", 0.0)
    opened = []
    real = progress._bar

    def bar(items, description, total, done=0):
        opened.append((total, done))
        return real(items, description, total, done)

    monkeypatch.setattr(progress, "_bar", bar)
    assert list(progress.track(range(5), "search", late=True)) == list(range(5))
    assert opened == [(5, 1)]
    assert "search" in terminal.getvalue()


@pytest.mark.parametrize(("rate", "shown"), [(None, ""), (0, ""), (1234.56, "1,234.6/s"), (0.5, "2.0 s each")])
def test_rates(rate: float | None, shown: str) -> None:
    assert rate_text(rate) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00:00"), (61, "0:01:01"), (86_400, "24:00:00")])
def test_times(seconds: float, shown: str) -> None:
    assert time_text(seconds) == shown
