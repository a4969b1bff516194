"""Progress goes to stderr: redrawn on a terminal, whole and rare lines elsewhere."""

from __future__ import annotations

import io
import threading

from vlm import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_items_pass_unchanged_and_a_log_gets_whole_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    assert list(progress.track((c for c in "abc"), "letters", total=3, unit="letter")) == ["a", "b", "c"]
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert lines[-1].startswith("letters: 100%")
    assert "letter/s" in lines[-1]


def test_a_listener_hears_every_step_and_then_no_more(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    heard = []
    with progress.listening(lambda *step: heard.append(step)):
        list(progress.track("ab", "letters"))
    list(progress.track("cd", "others"))
    assert heard == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2)]


def test_a_log_is_not_flooded(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    assert sum(progress.track(range(5000), "numbers")) == 5000 * 4999 // 2
    assert len(log.getvalue().splitlines()) == 2  # the first and the last


def test_a_terminal_is_redrawn_in_place(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(progress.track([1, 2], "numbers")) == [1, 2]
    assert "\r" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


def test_unknown_totals_and_resumed_work_are_counted(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress.progress_bar(None, "stream", unit="clip") as bar:
        bar.update(7)
    with progress.progress_bar(10, "rest", initial=4) as bar:
        bar.update(6)
    lines = log.getvalue().splitlines()
    assert any(line.startswith("stream: 7clip") for line in lines)
    assert any("10/10" in line for line in lines)


def test_no_thread_is_left_behind(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    before = threading.active_count()
    with progress.progress_bar(3, "work") as bar:
        bar.update()
        assert threading.active_count() == before
