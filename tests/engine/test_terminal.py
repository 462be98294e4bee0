"""What the terminal is spared while a run starts, and what it is not."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest

from rmoe.engine import terminal


def logger_with(path: Path) -> logging.Logger:
    logger = logging.Logger("test")
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(path)):
        logger.addHandler(handler)
    return logger


def test_long_records_and_noise_are_in_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger_with(tmp_path / "log")
    terminal.keep_short(logger)
    logger.info("System environment:\n  Python 3.11")
    logger.warning('"FileClient" will be deprecated in future.')
    logger.info("short")
    logger.warning("a note")
    logger.error("an error\nof two lines")
    assert capsys.readouterr().out == "short\na note\nan error\nof two lines\n"
    terminal.show_all(logger)
    logger.info("a\ntable")
    assert capsys.readouterr().out == "a\ntable\n"
    assert "Python 3.11" in (text := (tmp_path / "log").read_text())
    assert "FileClient" in text


def test_warnings_wait_for_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = logging.getLogger("py.warnings")
    monkeypatch.setattr(kept, "handlers", [])
    monkeypatch.setattr(kept, "propagate", True)
    monkeypatch.setattr(logging, "_warnings_showwarning", None)  # as if no test before had captured any
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        terminal.keep_warnings()
        warnings.warn("too early", stacklevel=1)
        terminal.keep_short(logger_with(tmp_path / "log"))
        warnings.warn("later", stacklevel=1)
        logging.captureWarnings(False)
    assert "too early" in (text := (tmp_path / "log").read_text())
    assert "later" in text
    assert capsys.readouterr() == ("", "")


def test_what_packages_print_when_imported(capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> None:
        with terminal.without_noise():
            print("Could not import OneDL")
            print("creating index...")
            print("of the config itself")
            raise KeyError

    with pytest.raises(KeyError):
        read()
    assert capsys.readouterr().out == "of the config itself\n"


@pytest.mark.parametrize(("rank", "said"), [("0", "rmoe: reading\n"), ("1", "")])
def test_the_first_process_speaks(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    terminal.say("reading")
    assert capsys.readouterr().out == said
