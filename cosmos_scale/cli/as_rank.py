"""What `train` and `profile` share: one process of a run, its start, and who prints where it fails."""

import errno
import os
import resource
import sys
from codecs import lookup
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_scale.errors import JointError, UserError
from cosmos_scale.exit_status import FAILED, REFUSED
from cosmos_scale.files import cause_in_the_machine, reason_of
from cosmos_scale.interrupt import refused_import
from cosmos_scale.threads import too_few_threads

if TYPE_CHECKING:  # functions import it, so that --help need not wait
    from cosmos_scale.config import RunConfig
    from cosmos_scale.engine.ranks import Ranks

# Of one process. A tiny run opens 40; with fewer, libraries fail with messages that name other causes.
FEWEST_OPEN_FILES = 64
# Of one process, beside its main one and those of numpy. A tiny run has 14 with one thread for torch.
FEWEST_THREADS = 16


@dataclass
class ThisRank:
    """This process among the ranks. ranks: once all of them run together. comes: whether it has gone to meet them.

    when_lost: says where the run stands, for the line that tells of a lost rank.
    """

    ranks: "Ranks | None" = None
    comes: bool = False
    when_lost: Callable[[], str] = str

    def start(self, config: "RunConfig") -> "Ranks":
        """Join the other ranks; raises UserError where that is impossible."""
        from cosmos_scale.engine.ranks import start_ranks

        self.comes = True
        self.ranks = start_ranks(config.device, config.log.level)
        return self.ranks


def as_rank(command: str, work: Callable[[ThisRank], int]) -> int:
    """Do a rank's work and return the exit status.

    A UserError leaves this function only on a rank that is to print it. A lost rank is told on one line.
    """
    from cosmos_scale.engine.rank_variables import WrongRankVariable, adopt_rank_variables

    rank = ThisRank()
    try:
        adopt_rank_variables()
        return work(rank)
    except WrongRankVariable:
        raise
    except UserError as error:
        if not rank.comes:
            _tell_other_hosts(str(error))
        # The main rank prints what all ranks refuse together. Before they run together an error may be of one machine
        # alone, so local rank 0 of each machine prints it.
        if not rank.ranks:
            prints = os.environ.get("LOCAL_RANK", "0") == "0"
        else:
            prints = rank.ranks.is_main or not isinstance(error, JointError)
        if not prints:
            return REFUSED
        raise
    except Exception as error:
        if not rank.comes and (told := told_cause(error)):
            _tell_other_hosts(told)
        if "RANK" not in os.environ or "cosmos_scale.engine.ranks" not in sys.modules:
            raise  # there were no other ranks, or torch could not be imported; a second import would abort the process
        from cosmos_scale.engine.ranks import lost_contact, tell_lost_contact

        if not lost_contact(error):
            raise
        tell_lost_contact(error, os.environ["RANK"], rank.when_lost(), command=command)
        return FAILED


def told_cause(error: Exception) -> str | None:
    """Return what to tell of an error whose cause is the machine, a named path or a library; None: another cause."""
    if isinstance(error, UnicodeEncodeError) and lookup(error.encoding) == lookup(sys.getfilesystemencoding()):
        return (
            f"{error.object}: the locale's encoding of paths, {error.encoding}, lacks "
            f"{error.object[error.start : error.end]!r}; rule: choose one that has it, such as LC_ALL=C.UTF-8"
        )
    cause = cause_in_the_machine(error)
    if cause is None:
        return refused_import(error)
    where = "" if cause.errno == errno.EMFILE or not cause.filename else f"{cause.filename}: "
    return f"{where}{reason_of(cause)}"


def _tell_other_hosts(refusal: str) -> None:
    """Tell the ranks of other hosts of a refusal that may be of this host alone, where nothing else ends them.

    That is deepspeed over several hosts. A rank of each host does it, after which the process may end.
    """
    from cosmos_scale.engine.rank_variables import WrongRankVariable, read_rank_variables
    from cosmos_scale.engine.refusal import tell_refusal
    from cosmos_scale.run.supervisor import is_child_of_deepspeed

    try:
        place = read_rank_variables()
    except WrongRankVariable:
        return
    if place is None or place.local_rank > 0 or not is_child_of_deepspeed():
        return
    ranks_here = int(os.environ.get("LOCAL_SIZE", place.world_size))
    if place.rank > 0 or ranks_here < place.world_size:
        tell_refusal(place, refusal, ranks_here)


def read_run(file: str, overrides: Sequence[str]) -> "RunConfig":
    """Return a run's config, once the launcher's variables and hostfile are sound too; raises UserError.

    The config comes before all imports that take seconds, so that its mistakes are told at once.
    """
    from cosmos_scale.cli.arguments import run_file
    from cosmos_scale.config.load import load_config
    from cosmos_scale.engine.messages import limit_messages
    from cosmos_scale.engine.rank_variables import read_rank_variables
    from cosmos_scale.run.supervisor import refuse_missing_hostfile

    refuse_missing_hostfile()
    path = run_file(file)
    config = load_config(path, overrides)
    _check_process()
    limit_messages(config.log.level)
    read_rank_variables()
    _say_other_folder(path, config)
    return config


def _check_process() -> None:
    """Raise UserError where the process may do less than the libraries need, which would fail with tracebacks."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= allowed < FEWEST_OPEN_FILES:
        raise UserError(f"open files: {allowed} are allowed; rule: at least {FEWEST_OPEN_FILES} (ulimit -n)")
    if few := too_few_threads(FEWEST_THREADS):
        raise UserError(few)
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # torch makes it when its optimizers are first used
    try:
        if cache:
            os.makedirs(cache, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"TORCHINDUCTOR_CACHE_DIR: {cache} cannot be made: {error.strerror}; rule: name a folder that can be "
            "written to, or unset it"
        ) from error


def _say_other_folder(path: Path, config: "RunConfig") -> None:
    """Say on stderr, on the main rank, where the config that lies in a run's folder is of a run in another folder.

    The folder was copied or moved: the run would go on in the former place, or begin anew there.
    """
    here, there = Path(os.path.realpath(path.parent)), Path(os.path.realpath(config.output / config.name))
    of_a_run = path.name == "config.yaml" and (here / "checkpoints").is_dir()
    if of_a_run and here != there and os.environ.get("RANK", "0") == "0":
        print(
            f"{path}: lies in the folder of a run, but names another, {there}, where this run goes on; to go on with "
            f"this one, call its folder {config.name} and say output={here.parent}",
            file=sys.stderr,
        )
