"""Records at Weights & Biases: one record of a run, in which each step stands once."""

import inspect
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cosmos_scale.config import WandbConfig
from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, whole_file, writing
from cosmos_scale.run.folder import SUPERSEDED_WANDB_ID, WANDB_ID
from cosmos_scale.run.tracker_entries import TrackerEntry, read_pictures, table_rows
from cosmos_scale.words import counted

CACHE = "WANDB_CACHE_DIR"
LOG_IN = "rule: log in (wandb login), or set log.wandb.mode to offline"
WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
SUPERSEDED = "superseded_by"
"""The key, in the config of a record whose steps were taken again, that names the record in its place."""


class WandbTracker:
    """The run's record: the one that its folder names, or a new one, which is given what is logged already.

    The service keeps all values that a step has ever had. So a run that takes steps again goes on in a new record (see
    `supersede`), and the earlier one gets another name and SUPERSEDED in its config.
    """

    name = "log.wandb"

    def __init__(
        self,
        folder: Path,
        config: WandbConfig,
        name: str,
        run_config: Mapping[str, Any],
        logged: Iterable[TrackerEntry],
    ) -> None:
        """Open the record; raises UserError.

        folder: the run's. logged: what a new record begins with, see `tracked_entries`; not read for another.
        """
        import wandb  # here: the import takes a second, and few runs need it

        self._wandb, self._mode = wandb, wandb_mode(config)
        identity = _identity_in(folder / WANDB_ID)
        new, old = identity is None, _identity_in(folder / SUPERSEDED_WANDB_ID)
        identity = identity or secrets.token_hex(4)
        self.announcements: list[str] = []
        _use_cache_that_can_be_written(folder)
        given = {"project": config.project, "dir": str(folder), "config": dict(run_config)}
        if new and old:
            self._mark(old, identity, {**given, "name": f"{name} (superseded)"})
        try:
            self._run = self._open(**given, name=name, id=identity, resume="allow")
            # The library's own step only grows, and it counts entries. The x axis is the run's step.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
            if new:
                self._begin(folder, identity, old, logged)
        except UserError:
            raise
        except Exception as failure:  # any: the library reads the environment and the network
            raise UserError(f"log.wandb: {_one_line(failure)}; {LOG_IN}") from failure
        if self._mode == "offline":
            where = Path(self._run.dir).parent
            self.announcements.append(f"{self.name}: offline; to send it: wandb sync {where}")

    def write(self, entry: TrackerEntry) -> None:
        """Write what there is of a step, with the time at which it was logged."""
        tables = {}
        for key, results in entry.tables.items():
            heads, rows = table_rows(results)
            tables[key] = self._wandb.Table(columns=[*heads], data=[list(row) for row in rows], allow_mixed_types=True)
        pictures: dict[str, Any] = {key: self._wandb.Image(picture) for key, picture in read_pictures(entry).items()}
        time = {} if math.isnan(entry.time) else {"_timestamp": entry.time}
        self._run.log({"step": entry.step, **time, **entry.numbers, **tables, **pictures})

    def close(self, *, failed: bool) -> None:
        """End the record."""
        try:
            self._run.finish(exit_code=1 if failed else 0)
        finally:
            # The library's own process may still write its file: `finish` does not wait for that, and a run leaves at
            # once. Where that process was killed, the library would show a traceback at the exit without this.
            self._end_process()

    def _end_process(self) -> None:
        try:
            self._wandb.teardown()
        except SystemExit as end:
            raise ChildProcessError(f"the library's process ended with status {end.code}") from end

    def _open(self, **given: Any) -> Any:
        # The library takes some 30 lines to tell where an offline run lies; `announcements` takes one.
        offline, mode = self._mode == "offline", self._mode
        settings = self._wandb.Settings(silent=True) if offline else self._wandb.Settings(quiet=True)
        return self._wandb.init(**given, mode=mode, settings=settings)  # type: ignore[arg-type]

    def _mark(self, old: str, new: str, given: Mapping[str, Any]) -> None:
        """Say in an earlier record that another has taken its place; a failure is told and ends nothing."""
        try:
            # "must": a record that was deleted, or never sent, is not made anew. Offline the library does not ask.
            record = self._open(**given, id=old, resume="must")
            record.config.update({SUPERSEDED: new})
            record.finish(exit_code=0)
        except Exception as failure:
            said = _one_line(failure)
            self.announcements.append(f"{self.name}: record {old} cannot be marked as superseded: {said}")

    def _begin(self, folder: Path, identity: str, old: str | None, logged: Iterable[TrackerEntry]) -> None:
        """Give a new record what is logged already; the run's folder names it only then."""
        count = 0
        for count, entry in enumerate(logged, 1):  # noqa: B007
            self.write(entry)
        if self._mode == "disabled":
            return
        with writing(folder / WANDB_ID), whole_file(folder / WANDB_ID) as part:
            part.write_text(identity)
        with suppress(OSError):
            (folder / SUPERSEDED_WANDB_ID).unlink(missing_ok=True)
        if old:
            kept = counted(count, "earlier entry", "earlier entries")
            self.announcements.append(
                f"{self.name}: steps are taken again: record {identity}, with {kept}, takes the place of {old}"
            )


def wandb_mode(config: WandbConfig) -> str | None:
    """Return the mode that the config names, or else the environment; raises UserError where there is no such mode."""
    environment = os.environ.get("WANDB_MODE")
    if environment is not None and environment not in WANDB_MODES:  # the library refuses it whatever the config says
        raise UserError(f"WANDB_MODE: {environment!r}; rule: one of {', '.join(WANDB_MODES)}, or unset")
    return config.mode or environment


def require_login(config: WandbConfig) -> None:
    """Raise UserError where records are to be sent, and the library finds no key to log in with; nothing is sent.

    Versions of the library that cannot be asked without asking the user tell it when the record is opened.
    """
    if wandb_mode(config) in WITHOUT_LOGIN:
        return
    import wandb  # here: the import takes a second, and few runs need it

    if "prompt" not in inspect.signature(wandb.login).parameters:
        return
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except Exception as failure:  # any: the library reads files of the user and the environment
        raise UserError(f"log.wandb: {_one_line(failure)}; {LOG_IN}") from failure
    if not logged_in:
        raise UserError(f"log.wandb: no key to log in with is configured; {LOG_IN}")


def _use_cache_that_can_be_written(folder: Path) -> None:
    """Let the library keep its cache in the run's folder where its own cannot be written to, as without a home.

    Its process writes its log there, and to standard error otherwise: 20 lines a run.
    """
    of_user = os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")
    cache = os.environ.get(CACHE) or Path(of_user, "wandb")
    try:
        os.makedirs(Path(cache, "logs"), exist_ok=True)
        if os.access(Path(cache, "logs"), os.W_OK | os.X_OK):
            return
    except OSError:
        pass
    os.environ[CACHE] = os.path.abspath(folder / "wandb" / "cache")


def supersede(folder: Path) -> None:
    """Note that the run's record at Weights & Biases has steps that are taken again, so that a new one is made.

    folder: the run's. To be called before these steps leave metrics.jsonl, also by a launch that logs elsewhere only.
    Raises UserError where the folder cannot be written to.
    """
    if _identity_in(folder / WANDB_ID) is not None:
        with writing(folder / WANDB_ID):
            (folder / WANDB_ID).replace(folder / SUPERSEDED_WANDB_ID)


def _identity_in(path: Path) -> str | None:
    """Return the name of a record that a file holds; None where there is no file, or it is torn."""
    try:
        identity = read_regular(path).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as failure:
        raise UserError(f"log.wandb: {path}: cannot be read: {failure.strerror or failure}") from failure
    return identity if re.fullmatch(r"[\w-]+", identity, re.ASCII) else None


def _one_line(failure: Exception) -> str:
    return " ".join(str(failure).split())
