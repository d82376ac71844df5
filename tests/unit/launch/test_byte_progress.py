import pytest

from launch.byte_progress import ByteProgress


def test_plain_lines_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with ByteProgress("reading", 400_000_000) as progress:
        for seconds in (5.0, 6.0, 1.0):
            clock[0] += seconds
            progress.advance(50_000_000)
    captured = capsys.readouterr()
    assert captured.err == "reading: 100 MB at 9.1 MB/s, 25%, about 33 s left\n"
    assert not captured.out


def test_an_unknown_total(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with ByteProgress("reading", None) as progress:
        clock[0] += 20
        progress.reach(40_000_000)
    assert capsys.readouterr().err == "reading: 40 MB at 2.0 MB/s\n"


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ByteProgress("reading", 1000) as progress:
        progress.reach(500)
    captured = capsys.readouterr()
    assert "reading" in captured.err
    assert not captured.out
