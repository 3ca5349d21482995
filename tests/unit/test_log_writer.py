"""Log lines that nobody takes: whoever logs does not wait, what waits is bounded, what is lost is told."""

import os

from shared import log_writer
from shared.log_writer import LogWriter


def test_what_nobody_takes_is_bounded_and_its_loss_is_told(monkeypatch):
    monkeypatch.setattr(log_writer, "MAX_BYTES", 1000)
    reading, writing = os.pipe()
    with os.fdopen(reading, "r") as reader, os.fdopen(writing, "w") as stream:
        filled = "x" * 65536
        os.write(writing, filled.encode())  # the pipe is full
        writer = LogWriter(stream)
        writer.write("first\n")
        while writer._lines:  # the thread has taken it, and waits for the pipe
            pass
        for number in range(300):
            writer.write(f"line {number:04}\n")
        assert writer.dropped == 200
        assert reader.read(len(filled)) == filled
        lines = [reader.readline() for _ in range(102)]
    assert (lines[0], lines[1], lines[100]) == ("first\n", "line 0000\n", "line 0099\n")
    assert lines[101] == "200 log lines were lost: nobody took them\n"
