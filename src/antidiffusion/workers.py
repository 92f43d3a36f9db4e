"""The same work on several processes of one machine, with the same bytes; a picture that kills its process is one."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from antidiffusion.batch import Outcome, Settings, Worker, clear, failed, groups
from antidiffusion.failures import FAILURES
from antidiffusion.folders import Job
from antidiffusion.models.base import Surrogate
from antidiffusion.process import end_with_parent

Group = Sequence[Job]
Load = Callable[[], Surrogate]
AHEAD = 2
"""Groups that are handed out for each process: one to do and one to go on with."""


def spread(jobs: Sequence[Job], settings: Settings, load: Load, count: int) -> Iterator[Outcome]:
    """Protect and save every job's picture on several processes; yields outcomes in the order in which they are known.

    When a process dies, as on a machine without memory left, what was under way is done again, one at a time. A group
    whose process dies twice fails.

    Arguments:
        jobs, settings: As in `antidiffusion.batch.run`.
        load: Gives the model; a function of a module, or a partial of one, which processes can import.
        count: Processes. Each loads the model.
    """
    clear(jobs)
    todo = groups(jobs, settings)
    # As many threads as one process would have the cores for, unless the environment says it.
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // count)
    try:
        while unsure := (yield from _pool(todo, settings, load, threads, count, AHEAD)):
            suspects = iter(unsure)
            clear(jobs)
            while died := (yield from _pool(suspects, settings, load, threads, 1, 1)):
                clear(jobs)
                got = "one that was killed twice, perhaps for its memory"
                error = RuntimeError(f"expected a process that ends by itself, got {got}; try a smaller --side")
                yield from [failed(job, error) for group in died for job in group]
    finally:  # what was killed with the pool
        clear(jobs)


def _pool(
    todo: Iterator[Group], settings: Settings, load: Load, threads: int, count: int, ahead: int
) -> Generator[Outcome, None, list[Group]]:
    """Work through `todo` until a process dies; return the groups of which it is not known what became of them.

    With one process and one group ahead, that is the group that killed it.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _begin, (settings, load, threads))
    running: dict[Future[list[Outcome]], Group] = {}
    try:
        while True:
            while len(running) < ahead * count and (group := next(todo, None)) is not None:
                try:
                    running[pool.submit(_perform, group)] = group
                except BrokenProcessPool:
                    return [*running.values(), group]
            if not running:
                return []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                if isinstance(future.exception(), BrokenProcessPool):
                    continue
                del running[future]
                yield from future.result()
            if any(future.done() for future in running):
                return list(running.values())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # it would finish a picture that nobody waits for
            process.join()


_worker: Worker | BaseException


def _begin(settings: Settings, load: Load, threads: int) -> None:
    """Prepare a process. What goes wrong with the model is for the first picture to say: a pool would only break."""
    global _worker
    end_with_parent()
    for name in ("SIGINT", "SIGHUP"):  # they come to a terminal's whole group; the first process ends the others
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(threads)
    warnings.simplefilter("once")
    try:
        _worker = Worker(settings, load())
    except FAILURES as error:
        _worker = error


def _perform(group: Group) -> list[Outcome]:
    if isinstance(_worker, BaseException):
        raise _worker
    return list(_worker(group))
