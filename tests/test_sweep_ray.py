"""Sweeps on Ray, with one-thread workers on this machine."""

from __future__ import annotations

import builtins
import os
import random
import signal
import subprocess
import time

import psutil
import pytest
from helpers import DEMO
from test_sweep import PROMPTS, hashes, log, results, shell, sweep

pytest.importorskip("ray")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
WORKERS = ["--ray", "auto", "--cpus_per_worker", "1"]


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    grid = ["--residual_target_layers", "3,5;4", "--residual_weights", "each:0.1;each:0.3"]
    base = ["--model", DEMO, "--device", "cpu", "--steps", 6, "--batch_size", 4]
    return [*base, "--prompt", tmp_path / "prompts.txt", "--seed", "0-3", *grid]


def test_ray_that_is_not_installed(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *more, **options):
        if name == "ray":
            raise ImportError(name)
        return real(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert sweep(tmp_path / "out", "--model", DEMO, "--prompt", "a star", "--ray", "auto") == 2
    assert capsys.readouterr().err == ("error: --ray: needs Ray; get it with: pip install -r requirements-ray.txt\n")


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "no cluster answers there"), ("local", "must be auto, or a cluster's address")],
)
def test_a_cluster_that_is_not_there(tmp_path, capsys, address, message):
    assert sweep(tmp_path / "out", "--model", DEMO, "--prompt", "a star", "--ray", address) == 2
    assert capsys.readouterr().err.startswith(f"error: --ray {address}: {message}")


@pytest.mark.slow
def test_mistakes(tmp_path, arguments):
    for more, message in {
        ("--cpus_per_worker", "1000"): "--cpus_per_worker 1000: no machine of the cluster has that many CPUs; at most",
        ("--cfg", "-1"): "--cfg -1: must be from 0",
        ("--width", "4096"): "--width 4096: is beyond this model's position grid",
    }.items():
        command = shell(tmp_path / "out", *arguments, "--ray", "auto", *more)
        done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=180)
        assert done.returncode == 2
        assert message in done.stderr
        assert [line[:6] for line in done.stderr.splitlines() if not line.endswith("on Ray")] == ["error:"]


def test_two_workers_one_of_them_killed_make_the_same_pictures(tmp_path, arguments):
    subprocess.run(shell(tmp_path / "one", *arguments), check=True, capture_output=True, env=ENV)
    wanted = hashes(tmp_path / "one")
    assert len(wanted) == 60
    out, luck = tmp_path / "ray", random.Random()
    driver = subprocess.Popen(
        shell(out, *arguments, *WORKERS), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV
    )
    moment = luck.randrange(8, 30)
    while driver.poll() is None and (not out.exists() or len([*out.glob("pictures/*.png")]) < moment):
        time.sleep(0.01)
    workers = [p for p in psutil.Process(driver.pid).children(recursive=True) if "ray::Worker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    luck.choice(workers).send_signal(signal.SIGKILL)
    _, error = driver.communicate(timeout=300)
    assert driver.returncode == 0, error
    assert "60 made, 0 were already finished, 0 failed" in error
    assert hashes(out) == wanted
    assert [line["file"] for line in results(out)] == [line["file"] for line in results(tmp_path / "one")]
    assert len(log(out, "encode")) == 1  # on one worker, though three were started
    assert len(log(out, "load")) in (2, 3)  # the third may come up when all is made


@pytest.mark.slow
def test_the_driver_is_killed_and_goes_on(tmp_path, arguments):
    out = tmp_path / "ray"
    driver = subprocess.Popen(
        shell(out, *arguments, *WORKERS), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV
    )
    while driver.poll() is None and (not out.exists() or len([*out.glob("pictures/*.png")]) < 10):
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    before = hashes(out)
    assert 10 <= len(before) < 60
    done = subprocess.run(shell(out, *arguments, *WORKERS), capture_output=True, text=True, env=ENV, check=True)
    assert f"{60 - len(before)} made, {len(before)} were already finished, 0 failed" in done.stderr
    subprocess.run(shell(tmp_path / "one", *arguments), check=True, capture_output=True, env=ENV)
    assert hashes(out) == hashes(tmp_path / "one")
