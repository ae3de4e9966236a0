"""Records at Weights & Biases: one record of a run, in which each step stands once."""

import inspect
import math
import os
import re
import secrets
import signal
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from cosmos_scale.config import WandbConfig
from cosmos_scale.errors import UserError
from cosmos_scale.files import read_regular, whole_file, writing
from cosmos_scale.run.folder import SUPERSEDED_WANDB_ID, WANDB_ID
from cosmos_scale.run.long_call import LongCall
from cosmos_scale.run.tracker_entries import TrackerEntry, read_pictures, table_rows
from cosmos_scale.words import counted

CACHE, DATA, SETTINGS = "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"
LOG_IN = "rule: log in (wandb login), or set log.wandb.mode to offline"
WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
INIT_TIMEOUT, FINISH_TIMEOUT = "WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"
MOST_SECONDS = 1_000_000  # of these two; Python waits for no infinite time
LONGEST_INIT = 20.0
"""Seconds for the service's answer when a record is opened, where INIT_TIMEOUT says none: the library waits for 90."""
LONGEST_WRITE = 10.0
"""Seconds that the training waits for the library's process to take an entry; it takes milliseconds."""
LONGEST_CLOSE = 60.0
LONGEST_UPLOAD = 300.0
"""Seconds for the end of a record that stays here, and of one that is sent; WANDB_FINISH_TIMEOUT may say more."""
_SMALL_FILE = 1 << 16  # bytes
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
        self._under_way: tuple[TrackerEntry, LongCall] | None = None
        identity = _identity_in(folder / WANDB_ID)
        new, old = identity is None, _identity_in(folder / SUPERSEDED_WANDB_ID)
        identity = identity or secrets.token_hex(4)
        self.announcements: list[str] = []
        _use_folders_that_can_be_written(folder)
        given = {"project": config.project, "dir": str(folder), "config": dict(run_config)}
        if new and old:
            self._mark(old, identity, {**given, "name": f"{name} (superseded)"})
        begun = time.monotonic()
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
            slow = time.monotonic() - begun > LONGEST_INIT
            rule = f"{LOG_IN}{f'; {INIT_TIMEOUT} allows more seconds' if slow else ''}"
            if self._mode in WITHOUT_LOGIN:
                rule = "rule: mend what it names, or leave log.wandb out"
            raise UserError(f"log.wandb: {_one_line(failure)}; {rule}") from failure
        # A last entry, the three waits of `close` for the record, and that for the library's process.
        self.longest_close = self._longest_finish() + 4 * LONGEST_WRITE + LONGEST_CLOSE
        if self._mode == "offline":
            where = Path(self._run.dir).parent
            self.announcements.append(f"{self.name}: offline; to send it: wandb sync {where}")

    def write(self, entry: TrackerEntry) -> None:
        """Write what there is of a step, with the time at which it was logged.

        Raises: TimeoutError where the library does not take it: it waits for its process for ever. The entry is on its
        way then, and to write it again waits for it, so that the record has it once.
        """
        limit = 0.0
        if self._under_way is None:
            self._under_way, limit = (entry, LongCall(partial(self._log, entry))), LONGEST_WRITE
        begun, call = self._under_way
        if not call.ends_within(limit):
            raise TimeoutError(f"the library's process has not taken an entry within {LONGEST_WRITE:g} s")
        self._under_way = None
        call.result()
        if begun is not entry:  # that one is no longer kept
            self.write(entry)

    def close(self, *, failed: bool) -> None:
        """End the record."""
        limit = LONGEST_WRITE if self._under_way else self._longest_finish()
        finish = LongCall(partial(self._run.finish, exit_code=1 if failed else 0))
        ended = finish.ends_within(limit)
        if not ended:
            _signal_library(signal.SIGCONT)  # a stopped process still has what is on its way to it
            ended = finish.ends_within(LONGEST_WRITE)
        if not ended:
            # It would hold the run's output open, so that whoever reads the output would wait for its end.
            _signal_library(signal.SIGKILL)
            finish.ends_within(LONGEST_WRITE)
        # The library's own process may still write its file: `finish` does not wait for that, and a run leaves at
        # once. And what the library would do at the exit is taken back by this.
        leave = LongCall(self._end_process)
        left = leave.ends_within(LONGEST_CLOSE)
        if not ended or not left:
            have = "written" if self._mode == "offline" else "sent"
            raise TimeoutError(
                f"the library's process has not ended the record within {limit:g} s, and what it has not {have} is "
                f"missing there; what it has written: wandb sync {Path(self._run.dir).parent}"
            )
        try:
            finish.result()
        finally:
            leave.result()
        if self._mode == "offline" and not (where := Path(self._run.dir).parent).exists():
            # The library writes on into a file that nobody can open any more.
            raise FileNotFoundError(
                f"{where} was removed while the run went on, and its entries are gone; metrics.jsonl has them: without "
                f"{WANDB_ID} the next launch begins a record with the whole curve"
            )

    def _log(self, entry: TrackerEntry) -> None:
        tables = {}
        for key, results in entry.tables.items():
            heads, rows = table_rows(results)
            tables[key] = self._wandb.Table(columns=[*heads], data=[list(row) for row in rows], allow_mixed_types=True)
        pictures: dict[str, Any] = {key: self._wandb.Image(picture) for key, picture in read_pictures(entry).items()}
        logged_at = {} if math.isnan(entry.time) else {"_timestamp": entry.time}
        self._run.log({"step": entry.step, **logged_at, **entry.numbers, **tables, **pictures})

    def _longest_finish(self) -> float:
        """Seconds for the end of the record, with some more than the user allows the library for its uploads."""
        own = float(getattr(self._run.settings, "finish_timeout", 0.0))  # older versions have no such setting
        return max(LONGEST_CLOSE if self._mode == "offline" else LONGEST_UPLOAD, own and own + LONGEST_CLOSE)

    def _end_process(self) -> None:
        # Where that process was killed, the library would show a traceback at the exit without this.
        try:
            self._wandb.teardown()
        except SystemExit as end:
            raise ChildProcessError(f"the library's process ended with status {end.code}") from end

    def _open(self, **given: Any) -> Any:
        # The library takes some 30 lines to tell where an offline run lies; `announcements` takes one.
        offline, mode = self._mode == "offline", self._mode
        settings = self._wandb.Settings(silent=True) if offline else self._wandb.Settings(quiet=True)
        if INIT_TIMEOUT not in os.environ:
            settings.init_timeout = LONGEST_INIT
        return self._wandb.init(**given, mode=mode, settings=settings)  # type: ignore[arg-type]

    def _mark(self, old: str, new: str, given: Mapping[str, Any]) -> None:
        """Say in an earlier record that another has taken its place; a failure is told and ends nothing."""
        try:
            # "must": a record that was deleted, or never sent, is not made anew. Offline the library does not ask.
            record = self._open(**given, id=old, resume="must")
            record.config.update({SUPERSEDED: new})
            finish = LongCall(partial(record.finish, exit_code=0))
            if not finish.ends_within(LONGEST_CLOSE):
                raise TimeoutError(f"the library's process has not ended it within {LONGEST_CLOSE:g} s")
            finish.result()
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


def _signal_library(number: signal.Signals) -> None:
    """Send a signal to the library's process, where it is one of this process."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # of a process, or a thread, that ends meanwhile
            for pid in read_regular(thread / "children").split():
                if b"wandb-core" in read_regular(f"/proc/{int(pid)}/cmdline"):
                    os.kill(int(pid), number)


def wandb_mode(config: WandbConfig) -> str | None:
    """Return the mode that the config names, or else the environment; raises UserError where there is no such mode."""
    environment = os.environ.get("WANDB_MODE")
    if environment is not None and environment not in WANDB_MODES:  # the library refuses it whatever the config says
        raise UserError(f"WANDB_MODE: {environment!r}; rule: one of {', '.join(WANDB_MODES)}, or unset")
    return config.mode or environment


def check_seconds() -> None:
    """Raise UserError where the environment has a wrong limit for the library: it refuses it when a record is opened.

    Infinite ones fail at the end of a record only.
    """
    for name in (INIT_TIMEOUT, FINISH_TIMEOUT):
        text = os.environ.get(name, "0")
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= MOST_SECONDS:
            raise UserError(f"{name}: {text!r}; rule: a number of seconds from 0 to {MOST_SECONDS:,}, or unset")


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


def _use_folders_that_can_be_written(folder: Path) -> None:
    """Let the library keep its cache and its data in the run's folder where its own cannot be written to.

    So it is without a home, with one that is read-only, and with one whose quota is used up. Its process writes its log
    into the cache, and to standard error otherwise: 20 lines a run. An evaluation's table goes through the data: one
    that it cannot take would hold up all records behind it.
    """
    own = folder / "wandb"
    for variable, of_user, of_home, used, here in (
        (CACHE, "XDG_CACHE_HOME", ".cache", "logs", "cache"),
        (DATA, "XDG_DATA_HOME", ".local/share", "artifacts/staging", "data"),
    ):
        user = os.environ.get(of_user) or os.path.join(os.path.expanduser("~"), of_home)
        place = Path(os.environ.get(variable) or os.path.join(user, "wandb"), used)
        if not _takes_files(place):
            os.environ[variable] = os.path.abspath(own / here)
    if os.path.expanduser("~") == "~":  # of a container's user whom the system does not know: the library asks for it
        os.environ.setdefault(SETTINGS, os.path.abspath(own / "config"))
        os.environ.setdefault("XDG_DATA_HOME", os.path.abspath(own))  # it asks for this where DATA is set, too


def _takes_files(folder: Path) -> bool:
    """Return whether a folder is there, or can be made, and takes a small file."""
    if str(folder).startswith("~"):  # no home is known: a folder of this name would be made in the current one
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_SMALL_FILE))
            file.flush()
    except OSError:
        return False
    return True


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
