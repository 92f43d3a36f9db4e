"""Running a plan's trials on several processes, one whole row at a time, so that a killed run goes on where it was."""

import json
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from antidiffusion.bench import rows as written
from antidiffusion.bench.instruments import Instruments
from antidiffusion.bench.plan import Plan, Trial
from antidiffusion.bench.rows import CLEAN, PICTURES, ROWS, Row
from antidiffusion.bench.trials import Laboratory, Task, protection
from antidiffusion.failures import FAILURES, sentence
from antidiffusion.models.base import Surrogate
from antidiffusion.process import end_with_parent

DIED = (
    "expected a row, got a worker process that died, as when memory runs out; run the same command again, with fewer "
    "--jobs if it happens again"
)
DEATHS = 3  # pools in a row that die before they have finished anything

Load = Callable[[str], Surrogate]


@dataclass(frozen=True)
class Done:
    """A trial that ended: the row that was written, or the sentence that says why there is none."""

    trial: Trial
    row: Row | None = None
    error: str | None = None


def run(plan: Plan, folder: Path, load: Load, *, jobs: int = 1) -> Iterator[Done]:
    """Run every trial that has no row yet; yields each when it is done, and first those that were done before.

    A row is appended to `rows.jsonl` when its pictures are whole. A trial that fails has none: the next run tries it.

    Arguments:
        plan: What is run.
        folder: Of the rows and pictures; a run that was stopped goes on in its own folder.
        load: Gives a model by its name; for several jobs a function of a module, which processes can import.
        jobs: Processes. Each loads the models.

    Raises:
        ValueError: If the folder has rows of another plan, another run is using it, a metric cannot be measured here,
            or worker processes die as often as they start.
    """
    Instruments(plan.metrics).check()
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield from _run(plan, folder, load, jobs)
    except Timeout:
        raise ValueError(
            f"expected a folder that no run is using, got {folder}; wait for that run or choose another"
        ) from None


def read_rows(path: Path) -> list[Row]:
    """Read rows, and cut off what a killed run left of its last one.

    Raises:
        ValueError: If a line is no row.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return written.read_rows(path) if whole else []


def _run(plan: Plan, folder: Path, load: Load, jobs: int) -> Iterator[Done]:
    trials = {plan.key(trial): trial for trial in plan.trials()}
    rows = {row.key: row for row in read_rows(folder / ROWS)}
    if foreign := rows.keys() - trials:
        raise ValueError(
            f"expected rows of this plan in {folder / ROWS}, got {len(foreign)} of another; use another folder"
        )
    models = {row.attacker: row.model for row in rows.values()}
    yield from (Done(trials[key], row) for key, row in rows.items())
    failed: set[str] = set()
    with (folder / ROWS).open("a", encoding="utf-8") as file, _workers(plan, folder, load, jobs) as submit:
        for wave in _waves(trials, rows):
            waiting: dict[Future[Row], str] = {}
            while wave or waiting:
                while wave and len(waiting) < jobs:
                    key = wave.popleft()
                    needed = {plan.key(need): need for need in needs(trials[key], plan)}
                    if missing := [need for other, need in needed.items() if other in failed]:
                        failed.add(key)
                        yield Done(
                            trials[key], error=f"not run, since it needs a trial that failed: {_named(missing[0])}"
                        )
                        continue
                    flags = [
                        flag for other, need in needed.items() if need.recipe == CLEAN for flag in rows[other].flags
                    ]
                    waiting[submit(Task(trials[key], tuple(flags)))] = key
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    key = waiting.pop(future)
                    try:
                        row = future.result()
                    except FAILURES as error:
                        failed.add(key)
                        yield Done(trials[key], error=DIED if isinstance(error, BrokenExecutor) else sentence(error))
                        continue
                    _check_model(row, models)
                    file.write(json.dumps(asdict(row), allow_nan=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    rows[key] = row
                    yield Done(trials[key], row)


def needs(trial: Trial, plan: Plan) -> list[Trial]:
    """Return the trials whose pictures a trial reads."""
    if trial.recipe == CLEAN:
        return [plan.floor(trial)] if trial.kind == "tuning" else []
    if trial.kind == "protection":
        return []
    return [protection(trial, plan), replace(trial, recipe=CLEAN)]


def _waves(trials: Mapping[str, Trial], rows: Mapping[str, Row]) -> Iterator[deque[str]]:
    """Yield the keys of the trials without a row, those that need others in a later wave."""

    def wave(pair: tuple[str, Trial]) -> tuple[bool, bool]:
        return pair[1].kind in ("protection", "floor"), pair[1].recipe == CLEAN

    for _, group in groupby(trials.items(), key=wave):
        yield deque(key for key, _ in group if key not in rows)


def _named(trial: Trial) -> str:
    return f"{trial.attack or 'protection'} of {trial.dataset}/{trial.item}, {trial.recipe}"


def _check_model(row: Row, models: dict[str, str]) -> None:
    known = models.setdefault(row.attacker, row.model)
    if known != row.model:
        got = f"{row.model}, where earlier rows have {known}"
        raise ValueError(f"expected the same weights and precision of {row.attacker}, got {got}; use another folder")


@contextmanager
def _workers(plan: Plan, folder: Path, load: Load, jobs: int) -> Iterator[Callable[[Task], Future[Row]]]:
    """Give a function that starts a task: in this process if there is one job, else in one of several."""
    if jobs == 1:
        laboratory = Laboratory(plan, folder, load)

        def inline(task: Task) -> Future[Row]:
            future: Future[Row] = Future()
            try:
                future.set_result(laboratory(task))
            except FAILURES as error:
                future.set_exception(error)
            return future

        yield inline
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pools, finished = [ProcessPoolExecutor(jobs, context, _begin, (plan, folder, load, threads))], [0]

    def count(future: Future[Row]) -> None:
        finished[-1] += not future.cancelled() and future.exception() is None

    def submit(task: Task) -> Future[Row]:
        try:
            future = pools[-1].submit(_perform, task)
        except BrokenExecutor:  # an executor that lost a process takes no more work
            if len(finished) >= DEATHS and not any(finished[-DEATHS:]):
                raise ValueError(f"{DIED}; it was tried {DEATHS} times") from None
            pools.append(ProcessPoolExecutor(jobs, context, _begin, (plan, folder, load, threads)))
            finished.append(0)
            future = pools[-1].submit(_perform, task)
        future.add_done_callback(count)
        return future

    try:
        yield submit
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


_laboratory: Laboratory


def _begin(plan: Plan, folder: Path, load: Load, threads: int) -> None:
    """Prepare a process."""
    global _laboratory
    end_with_parent()
    torch.set_num_threads(threads)
    warnings.simplefilter("once")  # each trial would repeat that its prompt was cut
    _laboratory = Laboratory(plan, folder, load)


def _perform(task: Task) -> Row:
    return _laboratory(task)
