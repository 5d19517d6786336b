"""A sweep on many GPUs or machines: Ray starts workers, restarts those that die and retries their batches."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dit_embedder
import mmditx
import other_impls
import sd3
import sd3_impls
from sd3.mistakes import Mistake, Where, verbatim
from sd3.prompt_tokens import Key
from sd3.reading import reading
from sd3.settings import Flags, Settings
from sd3.sweep.grid import Grid
from sd3.sweep.plan import Batch, Plan, make_plan
from sd3.sweep.work import BatchResult, Maker, Result
from sd3.text import Text

RETRIES = 3  # of a batch whose worker died
CODE = [sd3, dit_embedder, mmditx, other_impls, sd3_impls]  # modules that a worker imports, cloned or installed


class Worker:
    """One engine in its own process."""

    def __init__(self, threads: int | None, folder: str):
        if threads:
            torch.set_num_threads(threads)
        if not os.path.isdir(folder):
            raise Mistake(
                "ray", "", f"{verbatim(folder)} is not on every machine; relative paths in the flags start there"
            )
        os.chdir(folder)
        self.maker: Maker | None = None
        self.number: int | None = None

    def plan(self, grid: Grid) -> tuple[Plan, list[str]]:
        """See `make_plan`; runs on a worker, which has the device that makes the images."""
        return make_plan(grid)

    def encode(self, flags: Flags, pictures: Sequence[Settings]) -> tuple[dict[Key, Text], list[dict[str, Any]]]:
        """Encodes all texts of these images; returns the encoded texts and the events to log."""
        maker = Maker(flags, quiet=True)
        maker.encode(pictures)
        return maker.encoded_texts(pictures), maker.take_events()

    def make(
        self, number: int, flags: Flags, text: dict[Key, Text], batch: Sequence[Settings]
    ) -> tuple[list[Result], float, list[dict[str, Any]], dict[str, str]]:
        """Makes a batch with engine `number` and encoded `text`; returns results, seconds, events and hashes."""
        start = time.perf_counter()
        if self.maker is None or self.number != number:
            self.maker, self.number = None, number
            self.maker = Maker(flags, quiet=True)
            self.maker.add_texts(text)
            self.maker.load()
        results = self.maker.make(batch)
        return results, time.perf_counter() - start, self.maker.take_events(), self.maker.hashes()


class RayWorkers:
    """Workers on a Ray cluster; `auto` starts one on this machine if none runs.

    address: `auto` or that of a cluster; cpus: per worker if there is no GPU (None: all of a machine). Raises Mistake
    if Ray is not installed, the cluster does not answer or no machine has that many CPUs.
    """

    def __init__(self, address: str, cpus: int | None = None):
        self.ray = ray = connect(address)
        machines = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        if gpus := int(sum(m.get("GPU", 0) for m in machines)):
            count, threads, options = gpus, None, {"num_gpus": 1}
        else:
            sizes = [int(m.get("CPU", 0)) for m in machines]
            threads = cpus or max(sizes)
            count, options = sum(size // threads for size in sizes), {"num_cpus": threads}
            if count == 0:
                raise Mistake(
                    "cpus_per_worker", threads, f"no machine of the cluster has that many CPUs; at most {max(sizes)}"
                )
        options |= {"max_restarts": -1, "max_task_retries": RETRIES}
        worker = ray.remote(Worker).options(**options)
        self.workers = [worker.remote(threads, os.getcwd()) for _ in range(count)]

    def plan(self, grid: Grid) -> tuple[Plan, list[str]]:
        """See `make_plan`; also raises Mistake if no worker can start."""
        try:
            return self._get(self.workers[0].plan.remote(grid))
        except self.ray.exceptions.RayActorError as error:
            raise Mistake("ray", "", f"no worker can start ({verbatim(' '.join(str(error).split())[-300:])})") from None

    def __call__(self, plan: Plan, batches: Sequence[Batch], begin: Callable[[Batch], None]) -> Iterator[BatchResult]:
        """Makes batches on all workers; yields each as it finishes. begin: called with each batch as it is sent."""
        for number in sorted({b.engine for b in batches}):
            yield from self._make(number, plan.engines[number], [b for b in batches if b.engine == number], begin)

    def _make(
        self, number: int, flags: Flags, batches: Sequence[Batch], begin: Callable[[Batch], None]
    ) -> Iterator[BatchResult]:
        """Makes the batches of engine `number`. One worker encodes their text, once."""
        pictures = [p.settings for b in batches for p in b.pictures]
        text, events = self._get(self.workers[0].encode.remote(flags, pictures))
        shared, waiting, idle = self.ray.put(text), deque(batches), list(self.workers)
        running: dict[Any, tuple[Any, Batch]] = {}
        while waiting or running:
            while waiting and idle:
                worker, batch = idle.pop(), waiting.popleft()
                begin(batch)
                future = worker.make.remote(number, flags, shared, [p.settings for p in batch.pictures])
                running[future] = (worker, batch)
            (future,), _ = self.ray.wait(list(running), num_returns=1)
            worker, batch = running.pop(future)
            idle.append(worker)
            done = self._batch_result(batch, future)
            yield replace(done, events=[*events, *done.events])
            events = []

    def _batch_result(self, batch: Batch, future: Any) -> BatchResult:
        """The results of a batch; after the last retry, the reason of the failure in place of each image."""
        try:
            return BatchResult(batch, *self._get(future))
        except self.ray.exceptions.RayError as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return BatchResult(batch, [why] * len(batch.pictures), 0.0)

    def _get(self, future: Any) -> Any:
        """The value of a future. Raises the Mistake that a worker raised."""
        try:
            return self.ray.get(future)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Mistake) else error) from None


def check_reachable(address: str) -> None:
    """Raises Mistake if nothing listens at `HOST:PORT` or `ray://HOST:PORT`: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise Mistake("ray", address, "must be auto, or a cluster's address such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise Mistake("ray", address, f"no cluster answers there ({verbatim(str(error))})") from None


def connect(address: str) -> Any:
    """Ray, connected to a cluster; `auto` starts one on this machine if none runs."""
    try:
        import ray
    except ImportError:
        raise Mistake("ray", "", "needs Ray; get it with: pip install -r requirements-ray.txt") from None
    if ray.is_initialized():
        return ray
    if address != "auto":
        check_reachable(address)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        ray.init(address=address, runtime_env={"py_modules": CODE}, **quiet)
        return ray
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address != "auto":
            why = f"no cluster answers there ({verbatim(' '.join(str(error).split())[:200])})"
            raise Mistake("ray", address, why) from None
    root = Path(sd3.__file__).parent.parent  # a local cluster needs no copy of the code
    with reading(Where("ray", address), "cannot be started"):
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(root)}}, include_dashboard=False, **quiet)
    return ray
