"""A sweep on many GPUs or machines: Ray starts the workers, hands out batches, restarts what dies and tries again."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sd3.flags import Flags
from sd3.mistakes import Mistake
from sd3.settings import Settings
from sd3.sweep.grid import Grid
from sd3.sweep.plan import Batch, Plan, make_plan
from sd3.sweep.work import Done, Maker, Result, Text

RETRIES = 3  # times that a batch is tried again after its worker died
CODE = Path(__file__).parent.parent.parent
NOT_SENT = ["models/", "outputs/", "docs/", "tests/", "benchmarks/", ".*/", "*.safetensors", "*.png"]


class Worker:
    """One pipeline, in a process of its own."""

    def __init__(self, threads: int | None, folder: str):
        if threads:
            torch.set_num_threads(threads)
        if not os.path.isdir(folder):
            raise Mistake("ray", "", f"{folder} is not on every machine; the paths of the flags start there")
        os.chdir(folder)
        self.maker: Maker | None = None
        self.number: int | None = None

    def plan(self, grid: Grid) -> tuple[Plan, list[str]]:
        """See `make_plan`; on a worker, as it has the device that pictures are made on."""
        return make_plan(grid)

    def encode(self, flags: Flags, pictures: Sequence[Settings]) -> tuple[Text, list[dict[str, Any]]]:
        """Encodes all texts of these pictures; returns them, and what is to be logged."""
        maker = Maker(flags, quiet=True)
        maker.encode(pictures)
        return maker.known(pictures), maker.drain()

    def make(
        self, number: int, flags: Flags, text: Text, batch: Sequence[Settings]
    ) -> tuple[list[Result], float, list[dict[str, Any]], dict[str, str]]:
        """The pictures of a batch by engine `number`, with `text` encoded elsewhere; what is to be logged, hashes."""
        start = time.perf_counter()
        if self.maker is None or self.number != number:
            self.maker, self.number = None, number
            self.maker = Maker(flags, quiet=True)
            self.maker.know(text)
            self.maker.load()
        results = self.maker.make(batch)
        return results, time.perf_counter() - start, self.maker.drain(), self.maker.hashes()


class OnRay:
    """Workers on a cluster, which is started here where there is none.

    address: `auto` or a cluster's; cpus: of a worker where there is no GPU (None: all of a machine). Raises Mistake
    where Ray is not installed, or there is no such cluster or machine.
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
                raise Mistake("cpus_per_worker", threads, f"no machine here has so many; at most {max(sizes)}")
        options |= {"max_restarts": -1, "max_task_retries": RETRIES}
        worker = ray.remote(Worker).options(**options)
        self.workers = [worker.remote(threads, os.getcwd()) for _ in range(count)]

    def plan(self, grid: Grid) -> tuple[Plan, list[str]]:
        """See `make_plan`; raises what it raises, and Mistake where no worker can start."""
        try:
            return self._get(self.workers[0].plan.remote(grid))
        except self.ray.exceptions.RayActorError as error:
            raise Mistake("ray", "", f"no worker can start ({' '.join(str(error).split())[-300:]})") from None

    def __call__(self, plan: Plan, batches: Sequence[Batch], begin: Callable[[Batch], None]) -> Iterator[Done]:
        """Makes batches on all workers; yields them as they are done. begin: told each batch as it is handed out."""
        for number in sorted({b.engine for b in batches}):
            own, flags = [b for b in batches if b.engine == number], plan.engines[number]
            pictures = [p.settings for b in own for p in b.pictures]
            text, events = self._get(self.workers[0].encode.remote(flags, pictures))
            shared, waiting, running = self.ray.put(text), deque(own), {}
            idle = list(self.workers)
            while waiting or running:
                while waiting and idle:
                    worker, batch = idle.pop(), waiting.popleft()
                    begin(batch)
                    running[worker.make.remote(number, flags, shared, [p.settings for p in batch.pictures])] = (
                        worker,
                        batch,
                    )
                (future,), _ = self.ray.wait(list(running), num_returns=1)
                worker, batch = running.pop(future)
                idle.append(worker)
                try:
                    results, seconds, told, hashes = self._get(future)
                except self.ray.exceptions.RayError as error:
                    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    results, seconds, told, hashes = [why] * len(batch.pictures), 0.0, [], {}
                yield Done(batch, results, seconds, [*events, *told], hashes)
                events = []

    def _get(self, future: Any) -> Any:
        """A result; a mistake of the user's is raised as what it is."""
        try:
            return self.ray.get(future)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, (ValueError, OSError)) else error) from None


def knock(address: str) -> None:
    """Raises Mistake where nothing listens at `HOST:PORT` or `ray://HOST:PORT`: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise Mistake("ray", address, "must be auto, or a cluster's address such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise Mistake("ray", address, f"no cluster answers there ({error})") from None


def connect(address: str) -> Any:
    """Ray, connected to a cluster; `auto` starts one on this machine where none runs."""
    try:
        import ray
    except ImportError:
        raise Mistake("ray", "", "needs Ray; get it with: pip install -r requirements-ray.txt") from None
    if ray.is_initialized():
        return ray
    if address != "auto":
        knock(address)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    sent = {"working_dir": str(CODE), "excludes": NOT_SENT}
    try:
        ray.init(address=address, runtime_env=sent, **quiet)
        return ray
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address != "auto":
            why = f"no cluster answers there ({' '.join(str(error).split())[:200]})"
            raise Mistake("ray", address, why) from None
    here = {"env_vars": {"PYTHONPATH": str(CODE)}}
    ray.init(runtime_env=here, include_dashboard=False, **quiet)
    return ray
