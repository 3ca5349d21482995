"""What a terminal shows."""

from loadtest.load.drive import Progress
from loadtest.load.progress import Board, Printer


def report(**more) -> Progress:
    given = {"sent": 10, "done": 4, "shed": 2, "failed": 1, "tokens": 100, "ttfts_s": [0.2, 0.4, 0.6]}
    return Progress(**{**given, **more})


def test_drivers_are_added_up():
    board = Board(2)
    board.heard(0, report(), 1.0)
    board.heard(1, report(sent=5, done=5, shed=0, failed=0, tokens=50), 1.0)
    line = board.line(1.2, 40)
    assert "sent 15/40  in flight 3  done 9  shed 2  failed 1  150 tok/s  TTFT p50 400 ms" in line


def test_rates_are_of_the_last_seconds():
    board = Board(1)
    for second in range(1, 21):
        board.heard(0, report(tokens=1000 if second <= 10 else 10, ttfts_s=[float(second)]), float(second))
    line = board.line(20.0, None)
    assert " 10 tok/s" in line
    assert "sent 10  in" in line


def test_nothing_heard_yet():
    assert "sent 0  in flight 0" in Board(1).line(0.5, None)
    assert "TTFT p50 -" in Board(1).line(0.5, None)


def test_a_line_every_two_seconds():
    said: list[str] = []
    printer = Printer(Board(1), None, said.append)
    for tick in range(41):
        printer.tick(tick / 4)
    assert len(said) == 5
