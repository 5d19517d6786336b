"""`kill -9` at random moments: nothing is lost, nothing made twice, nothing half. Seeds are printed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import DEMO, ROOT
from PIL import Image
from safetensors.torch import load_file

import sd3_infer
from sd3.record import finish_killed

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ["--model", str(DEMO), "--device", "cpu", "--dtype", "float32", "--width", "64", "--height", "64"]
TIMES = 6
pytestmark = pytest.mark.slow


@pytest.fixture
def luck() -> random.Random:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return random.Random(seed)


def start(*arguments, **options) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=ENV, cwd=ROOT, text=True, **quiet)


def kill(process: subprocess.Popen, ready: Callable[[], object], after: float) -> bool:
    """Kills a process some time after it is ready; False where it was done before that."""
    deadline = time.time() + 180
    while process.poll() is None and not ready() and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def pixels(paths) -> list[bytes]:
    """The pictures, each of which must be whole."""
    out = []
    for path in sorted(paths):
        with Image.open(path) as image:
            image.load()
            out.append(image.tobytes())
    return out


def record(folder: Path) -> list[str]:
    """The pictures that a killed run's record names, before and after the next start."""
    assert not (folder / "run.json").exists()
    first, *lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    assert first["status"] == "running"
    assert all(p["settings"]["prompt"] for p in lines)
    assert len(finish_killed(folder.parent)) == 1
    run = json.loads((folder / "run.json").read_text())
    assert (run["status"], run["pictures"]) == ("killed", lines)
    assert run["model_sha256"] == first["model_sha256"]
    assert not [*folder.glob("*.jsonl"), *folder.glob(".lock")]
    return [p["file"] for p in lines]


def test_a_run(tmp_path, luck):
    run = [*SMALL, "--prompt", "a red circle", "--seed", "0", "--num_images", "60", "--steps", "4"]
    assert start(ROOT / "sd3_infer.py", *run, "--out_dir", tmp_path / "whole").wait() == 0  # on as many threads
    wanted = pixels((tmp_path / "whole").rglob("[0-9]*.png"))
    for time_ in range(TIMES):
        out = tmp_path / str(time_)
        process = start(ROOT / "sd3_infer.py", *run, "--out_dir", out)
        assert kill(process, lambda out=out: list(out.rglob("run.jsonl")), luck.uniform(0, 2))
        (folder,) = out.glob("demo/*")
        made = sorted(folder.glob("[0-9]*.png"))
        assert [p.name for p in made] == [f"{i:06d}.png" for i in range(len(made))]
        assert pixels(made) == wanted[: len(made)]
        assert record(folder) in ([p.name for p in made], [p.name for p in made[:-1]])


def test_a_sweep(tmp_path, luck):
    (tmp_path / "p.txt").write_text("a red circle\ntwo green stars\n")
    sweep = [ROOT / "sd3_sweep.py", *SMALL, "--steps", "3", "--prompt", tmp_path / "p.txt", "--seed", "0-9",
             "--residual_target_layers", "3;5", "--batch_size", "3", "--out"]  # fmt: skip
    assert start(*sweep, tmp_path / "whole").wait() == 0
    out = tmp_path / "killed"
    seen: dict[str, int] = {}
    for _ in range(TIMES):
        before = len(list(out.glob("pictures/*.png")))
        there = lambda before=before: len(list(out.glob("pictures/*.png"))) > before  # noqa: E731
        kill(start(*sweep, out), there, luck.uniform(0, 0.3))
        now = {p.name: p.stat().st_mtime_ns for p in out.glob("pictures/*.png")}
        assert seen.items() <= now.items()
        seen = now
        pixels(out.glob("pictures/*.png"))
    assert start(*sweep, out).wait() == 0
    both = [{p.name: p.read_bytes() for p in (o / "pictures").iterdir()} for o in (tmp_path / "whole", out)]
    assert both[0] == both[1]
    differences = [{p.name: p.read_bytes() for p in (o / "difference").iterdir()} for o in (tmp_path / "whole", out)]
    assert differences[0] == differences[1]
    made = Counter(
        json.loads(line).get("picture")
        for line in (out / "log.jsonl").read_text().splitlines()
        if '"event": "made"' in line
    )
    assert max(made.values()) == 1
    assert not [*out.rglob("*.partial")]


def test_a_calibration(tmp_path, luck):
    (tmp_path / "p.txt").write_text("".join(f"a red circle {i}\n" for i in range(80)))
    code = "import sys; from sd3.probe import command, state; state.SAVE_EVERY = 0; "
    code += "sys.exit(command.main(sys.argv[1:]))"
    work = ["-c", code, "calibrate", *SMALL, "--prompts", tmp_path / "p.txt", "--targets", "3,5", "--steps", "4",
            "--batch_size", "2", "--out"]  # fmt: skip
    assert start(*work, tmp_path / "whole.safetensors").wait() == 0
    out, state = tmp_path / "r.safetensors", tmp_path / ".r.safetensors.state"
    went_on = 0
    for _ in range(TIMES):
        before = state.stat().st_mtime_ns if state.exists() else 0
        changed = lambda before=before: state.exists() and state.stat().st_mtime_ns != before  # noqa: E731
        kill(start(*work, out), changed, luck.uniform(0, 0.2))
        went_on += state.exists()
    assert went_on
    assert start(*work, out).wait() == 0
    whole, again = load_file(tmp_path / "whole.safetensors"), load_file(out)
    assert whole.keys() == again.keys()
    assert all(whole[name].equal(again[name]) for name in whole)
    assert not state.exists()


def test_a_served_session(tmp_path, luck):
    serve = ["--serve_stdin", *SMALL, "--steps", "3"]
    for time_ in range(TIMES):
        out = tmp_path / str(time_)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = start(ROOT / "sd3_infer.py", *serve, "--out_dir", out, **pipes)
        process.stdin.write("".join(json.dumps({"prompt": "a star", "seed": i}) + "\n" for i in range(500)))
        process.stdin.flush()
        assert kill(process, lambda out=out: list(out.rglob("run.jsonl")), luck.uniform(0, 2))
        answers = [json.loads(line) for line in process.stdout.read().splitlines() if line.endswith("}")]
        process.stdout.close()
        (folder,) = out.glob("demo/*")
        made = sorted(folder.glob("[0-9]*.png"))
        pixels(made)
        answered = [Path(a["files"][0]).name for a in answers]
        assert answered == [p.name for p in made][: len(answered)]
        assert 0 <= len(made) - len(answered) <= 1
        assert record(folder) in ([p.name for p in made], [p.name for p in made[:-1]])


def test_an_embedding_cache_being_filled(tmp_path, luck):
    (tmp_path / "p.txt").write_text("".join(f"a red circle {i} {'and a star ' * (i % 3)}\n" for i in range(60)))
    flags = [*SMALL[:-4], "--width", "32", "--height", "32", "--prompt", str(tmp_path / "p.txt"), "--seed", "1",
             "--steps", "1"]  # fmt: skip
    assert sd3_infer.main([*flags, "--out_dir", str(tmp_path / "plain")]) == 0
    wanted = pixels((tmp_path / "plain").rglob("[0-9]*.png"))
    cache = tmp_path / "cache"
    for time_ in range(TIMES):
        before = len(list(cache.glob("*.safetensors")))
        more = lambda before=before: len(list(cache.glob("*.safetensors"))) > before  # noqa: E731
        process = start(ROOT / "sd3_infer.py", *flags, "--embed_cache", cache, "--out_dir", tmp_path / str(time_))
        kill(process, more, luck.uniform(0, 0.05))
        for path in cache.glob("*.safetensors"):
            load_file(path)  # each is whole
    assert sd3_infer.main([*flags, "--embed_cache", str(cache), "--out_dir", str(tmp_path / "cached")]) == 0
    assert pixels((tmp_path / "cached").rglob("[0-9]*.png")) == wanted
