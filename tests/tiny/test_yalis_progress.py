"""A bar on a terminal when it takes long, lines in a log, and nothing for what is quick."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from yalis import LLM, SamplingParams
from yalis.progress import TerminalProgress
from yalis.testing import make_checkpoint


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def count(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, **options: bool) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with TerminalProgress(**options) as progress:
        for phase in ("reading", "writing"):
            for done in range(4):
                progress(phase, done, 3)
    return stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_is_quick_says_nothing(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count(stream(), monkeypatch) == ""


def test_what_takes_long_shows_a_bar_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yalis.progress._QUIET_S", -1.0)
    shown = count(Terminal(), monkeypatch)
    assert shown.index("reading") < shown.index("writing")
    assert "3/3" in shown
    assert count(Terminal(), monkeypatch, is_shown=False) == ""


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yalis.progress._QUIET_S", -1.0)
    assert count(io.StringIO(), monkeypatch) == "reading: 1 of 3\nwriting: 1 of 3\n"


@pytest.mark.parametrize("use_tqdm", [True, False])
def test_generate_shows_a_bar_on_a_terminal_unless_told_not_to(
    use_tqdm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yalis.progress._QUIET_S", -1.0)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    with LLM(make_checkpoint(tmp_path, num_hidden_layers=1)) as llm:
        for stream in (Terminal(), io.StringIO()):
            monkeypatch.setattr(sys, "stderr", stream)
            llm.generate("x", params, use_tqdm=use_tqdm)
            is_shown = use_tqdm and stream.isatty()
            assert ("20/20" in stream.getvalue()) == is_shown
            assert ("generating tokens" in stream.getvalue()) == is_shown
