"""The training line: a log's line can be searched, a terminal's fits."""

import pytest

from bigmodel.metrics.progress import LiveLine, fitted

DUE = {"save": 100_500, "evaluation": 101_000}


def test_a_log_has_loss_rates_time_left_and_what_comes_next(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", iter([100.0, 7300.0]).__next__)
    line = LiveLine(100_000, 100_400, enabled=True)
    line.update(100_001, 2.0, 12_300.0, utilization=None, due={"save": 0})
    line.update(100_400, 1.5, 12_345.0, "rank 3 on node-2 is slow", utilization=0.3456, due=DUE)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "step 100001/100400  loss 2.000  12.3k tokens/s"
    assert last == (
        "step 100400/100400  loss 1.500  12.3k tokens/s  rank 3 on node-2 is slow  MFU 34.6%  0 s left"
        "  save at 100500  evaluation at 101000"
    )


PARTS = ["step 100000/100400", "loss 1.500", "12.3k tokens/s", "MFU 34.6%", "12 min left", "save at 100500"]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (120, "  ".join([*PARTS, "evaluation at 101000"])),
        (86, "100000/100400  loss 1.500  12.3k tok/s  MFU 34.6%  12m left  save 100500  eval 101000"),
        (80, "100000/100400 loss 1.500 12.3k tok/s MFU 34.6% 12m left save 100500 eval 101000"),
        (70, "100000/100400 loss 1.500 12.3k tok/s MFU 34.6% 12m left save 100500"),
        (30, "100000/100400 loss 1.500"),
        (10, "100000/100"),
    ],
)
def test_a_line_of_a_terminal_fits(width: int, shown: str) -> None:
    assert fitted([*PARTS, "evaluation at 101000"], width) == shown
    assert len(shown) <= width
