"""Scores the weights that are to ship, see `demo.score.record`: `python -m demo.record`."""

from demo.command_line import run
from demo.score import record

if __name__ == "__main__":
    run(record, "demo.record")
