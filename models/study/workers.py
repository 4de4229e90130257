"""The runs of a study, several at a time, each done once: trained, evaluated, and its result written to a file."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models import data
from models.attacks import ATTACKS
from models.data import Source
from models.evaluation import BATCH_SIZE, EvaluationError, Outcome, evaluate_clean
from models.evaluation.outcomes import Job, Outcomes, digest
from models.runs import session
from models.runs.settings import completed
from models.study.plan import Run, Study
from models.support import environment, files
from models.support.errors import UserError
from models.support.interrupts import Interrupted
from models.training import Trainer, TrainingError
from models.training.lipschitz import SlopeError

Status = Mapping[str, str]  # run under way -> what it is doing
Do = Callable[[Study, Run, Path, Path], dict[str, Any]]
"""Does a run: (study, run, folder of results, folder of checkpoints) -> its result, which it has written too."""
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 20.0


class StudyError(UserError):
    """A study that cannot go on."""


def result_file(results: Path, run: Run) -> Path:
    """Return where a run's result is kept."""
    return results / "runs" / f"{run.name}.json"


def read(results: Path, study: Study) -> dict[str, dict[str, Any]]:
    """Return the results that are there, by run.

    Raises:
        StudyError: one was made with other settings.
    """
    found = {}
    for run in study.runs():
        path = result_file(results, run)
        result = _read(path)
        if result is None:
            continue
        # Both rounded as results are written, or eps = 8/255 would differ from itself.
        theirs, wanted = (files.rounded(s) for s in (completed(result["settings"]), settings(study, run)))
        names = [name for name in {**wanted, **theirs} if name not in wanted or theirs.get(name) != wanted[name]]
        if names:
            raise StudyError(
                f"{path} was made with other settings: {', '.join(names)} differ; give another --out, or remove it"
            )
        found[run.name] = result
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result = files.read_json(path)
    except ValueError as error:
        raise StudyError(f"{path} is not valid JSON ({error}); remove it to do this run again") from error
    if result is not None and not (isinstance(result, dict) and isinstance(result.get("settings"), dict)):
        raise StudyError(f"{path} is no result of a study; give another --out, or remove it")
    return result


def work(
    study: Study,
    todo: list[Run],
    results: Path,
    folder: Path,
    jobs: int,
    threads: int,
    on_change: Callable[[Status], None],
    on_result: Callable[[Run, dict[str, Any]], None],
    do: Do | None = None,
) -> None:
    """Do the runs, `jobs` at a time, in processes of `threads` threads; results are files, and shown as they come.

    Args:
        study, todo: the study, and which of its runs.
        results: folder of result files.
        folder: of checkpoints, from which an interrupted run goes on.
        on_change: called about twice a second with what each run under way is doing.
        on_result: called with each result.
        do: does one run; `train_and_attack` unless given.

    Raises:
        Interrupted: Ctrl-C; runs under way have saved their states.
    """
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    status: dict[str, str] = {}
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _begin, (threads, said)) as pool:
        futures = {pool.submit(do or train_and_attack, study, run, results, folder): run for run in todo}
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
                while not said.empty():
                    name, doing = said.get()
                    status[name] = doing
                on_change(status)
                for future in done:
                    status.pop(futures[future].name, None)
                    on_result(futures[future], future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_said: Any = None  # in a worker: the queue of (run, what it is doing)


def _begin(threads: int, said: Any) -> None:
    global _said
    _said = said
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Stop this process where the one that began it is gone, however it went: nobody would take its results."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # training saves its state
    time.sleep(_GRACE_SECONDS)
    os._exit(1)


def say(run: Run, text: str) -> None:
    """Tell whoever shows progress what a run is doing."""
    if _said is not None:
        _said.put((run.name, text))


def train_and_attack(study: Study, run: Run, results: Path, folder: Path) -> dict[str, Any]:
    """Train and evaluate one run, or go on with it, and write its result; of a run that fails, the reason."""
    common = described(study, run)
    try:
        trainer = _train(run, folder / run.name)
        result = {
            **common,
            "history": [asdict(epoch) for epoch in trainer.history],
            "collapsed": trainer.collapsed,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            **_evaluate(study, run, trainer, folder / run.name),
        }
    except KeyboardInterrupt as error:
        raise Interrupted from error
    except (TrainingError, SlopeError, EvaluationError) as error:
        result = {**common, "error": str(error)}
    files.write_result(result_file(results, run), result)
    return result


def _train(run: Run, folder: Path) -> Trainer:
    trainer = session.prepare(run.settings, folder)
    trainer.run(lambda t: say(run, f"training, {t.steps_done / t.steps:.0%}"))
    return trainer


def _evaluate(study: Study, run: Run, trainer: Trainer, folder: Path) -> dict[str, Any]:
    images, labels = part(study, run.seed).tensors(study.count())
    model = trainer.result.eval()
    clean = evaluate_clean(model, images, labels)
    identity = {"network": digest(trainer.checkpoint), "data": study.data}
    if study.part != "test":
        identity["part"] = study.part
    kept = Outcomes(folder / "evaluation", identity, model, images, labels, BATCH_SIZE)

    def outcome(label: str, attack: str) -> Outcome:
        say(run, label)
        return kept.get(Job(label, ATTACKS.create(attack, run.panel.eps), study.count(label), seed=0))

    outcomes = {label: outcome(label, attack) for label, attack in study.attacks.items()}
    return {
        "wrong": clean.mask,
        "found": {label: o.mask for label, o in outcomes.items()},
        "seconds": {label: round(o.seconds, 1) for label, o in outcomes.items()},
    }


def part(study: Study, seed: int) -> Source:
    """Return the images on which a study measures accuracy."""
    sets = data.load(study.data, seed)
    return sets.validation if study.part == "validation" else sets.test


def described(study: Study, run: Run) -> dict[str, Any]:
    """Return what is known of a run's result before it has one."""
    return {
        "settings": settings(study, run),
        "environment": environment.describe(),
        "rate": run.rate,
        "frozen": study.frozen(run.activation),
    }


def settings(study: Study, run: Run) -> dict[str, Any]:
    """Return everything that decides a run's result."""
    where = {} if study.part == "test" else {"part": study.part}
    return {**run.settings.as_dict(), "attacks": study.attacks, "eps": run.panel.eps, "images": study.images, **where}
