"""Compares files of many and of few prompts: peak memory, size of the record, time to write it, and what is left after
a kill.

    python benchmarks/many_prompts.py [--prompts 10000] [--few 100] [--side 64]

The shipped model, one step, cfg 1, float32, one thread; every run is a separate process. The third run is killed
(SIGKILL) when half of its images are in its record. Then a run of one prompt into the same folder completes the record.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire

sys.path.insert(0, str(Path(__file__).parent.parent))

import sd3_infer
from sd3.record import LINES, RUN, RunRecord

MODEL = Path(__file__).parent.parent / "models" / "demo" / "demo.safetensors"


def make(prompts: Path, out: Path, side: int) -> None:
    """One run in this process. Prints the seconds spent on the record, and in total."""
    spent = 0.0

    def timed(name: str) -> None:
        real = getattr(RunRecord, name)

        def measured(*arguments: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return real(*arguments)
            finally:
                spent += time.perf_counter() - start

        setattr(RunRecord, name, measured)

    for name in ("add", "end"):
        timed(name)
    start = time.perf_counter()
    flags = f"--model {MODEL} --device cpu --dtype float32 --steps 1 --cfg 1 --seed 1 --width {side} --height {side}"
    assert sd3_infer.main([*flags.split(), "--prompt", str(prompts), "--out_dir", str(out)]) == 0
    print(json.dumps({"record": spent, "seconds": time.perf_counter() - start}), file=sys.stderr)


class Run:
    """A run in a separate process."""

    def __init__(self, place: Path, name: str, prompts: int, side: int, out: Path | None = None):
        """out: the output folder, if the run writes into that of an earlier run."""
        self.out, file = out or place / name, place / f"{name}.txt"
        file.write_text("".join(f"a red circle left of a blue square {i}\n" for i in range(prompts)))
        words = [sys.executable, __file__, "make", file, self.out, side]
        with open(place / f"{name}.log", "w") as log:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": log}
            self.process = subprocess.Popen(
                list(map(str, words)), **quiet, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            )
        self.log = Path(log.name)

    def wait(self) -> float:
        """Waits for the end and returns the peak resident memory in MB. Raises RuntimeError if the run failed, but not
        if it was killed.
        """
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(self.log.read_text()[-2000:])
        return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)

    def times(self) -> dict[str, float]:
        """Seconds spent on the record, and in total."""
        return json.loads(self.log.read_text().splitlines()[-1])

    def folder(self, name: str) -> Path:
        """The run's output folder; waits until it has a file `name`."""
        while not (found := list(self.out.rglob(name))):
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.05)
        return found[0].parent


def compare(prompts: int = 10_000, few: int = 100, side: int = 64) -> None:
    """Prints the table, and what is left after the kill."""
    with tempfile.TemporaryDirectory() as place:
        peaks = []
        print(
            "| prompts | peak memory | time per image | size of `run.json` | time to write the record | "
            "that time, share of the run |"
        )
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        for count in (few, prompts):
            run = Run(Path(place), f"of_{count}", count, side)
            peaks.append(run.wait())
            times, size = run.times(), (run.folder(RUN) / RUN).stat().st_size
            print(
                f"| {count:,} | {peaks[-1]:.0f} MB | {1000 * times['seconds'] / count:.0f} ms | {size / 1e6:.2f} MB | "
                f"{times['record']:.2f} s | {times['record'] / times['seconds']:.2%} |",
                flush=True,
            )
        print(f"peak memory of {prompts:,} prompts to {few:,}: {peaks[1] / peaks[0]:.3f}")
        show_kill(Path(place), prompts, side)


def show_kill(place: Path, prompts: int, side: int) -> None:
    """Kills a run halfway, starts the next one and prints what the folder holds."""
    run = Run(place, "killed", prompts, side)
    folder = run.folder(LINES)
    while (folder / LINES).read_bytes().count(b"\n") <= prompts // 2:  # a header line, then one per image
        time.sleep(0.2)
        assert run.process.poll() is None, "it was done before the kill"
    run.process.kill()
    run.wait()
    pictures = sorted(path.name for path in folder.glob("*.png"))
    lines = (folder / LINES).read_bytes().count(b"\n") - 1
    start = time.perf_counter()
    Run(place, "next", 1, side, run.out).wait()
    seconds = time.perf_counter() - start
    record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    missing = set(pictures) - {picture["file"] for picture in record["pictures"]}
    print(
        f"killed in the middle: {len(pictures):,} pictures, {lines:,} of them in {LINES}; after the next start (of one "
        f"picture, {seconds:.1f} s) {RUN} is {record['status']}, with {len(record['pictures']):,} pictures of "
        f"{record['planned']:,}; {len(missing)} missing"
    )


if __name__ == "__main__":
    fire.Fire({"make": make, "compare": compare} if sys.argv[1:2] == ["make"] else compare)
