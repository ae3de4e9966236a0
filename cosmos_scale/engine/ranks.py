"""Start of the process group, and the few collectives of the training loop."""

import atexit
import contextlib
import io
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_scale.engine.comm_build import is_built, load_cpu_communication, use_own_environment
from cosmos_scale.engine.comm_memory import check_room, delete_name, sweep
from cosmos_scale.engine.contact import Contact, LostRank
from cosmos_scale.engine.gpu_memory import use_expandable_segments
from cosmos_scale.engine.meeting import meet, meet_at_agent
from cosmos_scale.engine.messages import limit_messages
from cosmos_scale.engine.rank_variables import WrongRankVariable, check_nccl_interfaces, read_rank_variables
from cosmos_scale.errors import JointError, UserError
from cosmos_scale.files import read_regular
from cosmos_scale.host import ranks_of_this_host, usable_cores, uses_gpu

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process's place among all ranks.

    control: a group of all ranks on the CPU, for small messages. contact: tells which rank has ended.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup
    contact: Contact

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        """The groups of all ranks, by their names for people."""
        tensors = dist.group.WORLD
        assert tensors is not None, "a group is joined before there are ranks"
        return {"the group of tensors": tensors, "the group of small messages": self.control}


_started: list[Ranks] = []  # the ranks of this process, once they have started
_contacts: list[Contact] = []  # this process's contact to the other ranks, once it has met them

FIRST_PORT, PORTS_TRIED = 10_000, 50  # of `free_port`: below lie the ports of well-known services
NAMED_WITHIN = 5.0  # seconds in which the contact learns of a rank whose end broke a collective


def start_ranks(device: str, level: str = "error") -> Ranks:
    """Join the process group named by the launcher's environment, or make a group of one.

    The group lasts as long as the process, since DeepSpeed keeps the first group that it sees; a second call returns
    the same ranks.

    device: auto, cpu or cuda. level: least level of the messages of torch and DeepSpeed that are shown. Raises
    UserError where cuda is asked for and absent, where the ranks have started on another device, where shared memory is
    too small for ranks on CPUs, or where DeepSpeed's communication for them cannot be built.
    """
    use_cuda = choose_device(device).type == "cuda"
    if not _started:
        _started.append(_start(use_cuda, level))
    (ranks,) = _started
    if (ranks.device.type == "cuda") != use_cuda:
        raise UserError(f"device: {device!r}, but this process's ranks have started on {ranks.device.type}")
    return ranks


def _start(use_cuda: bool, level: str) -> Ranks:
    limit_messages(level)
    if use_cuda:
        check_nccl_interfaces()
    use_own_environment()
    import deepspeed  # here, since it takes seconds and --help should not

    limit_messages(level)  # of DeepSpeed's logger, which the import has set up
    local_rank = _use_own_device() if use_cuda else int(os.environ.get("LOCAL_RANK", "0"))
    backend = "nccl" if use_cuda else "gloo"
    if not dist.is_initialized():
        _join(backend)
    if not _contacts:  # a process alone, or a group that was made elsewhere
        _contacts.append(Contact(dist.get_rank(), {}))
    if not use_cuda:
        if local_rank == 0:
            sweep()
            if not is_built():
                said = "DeepSpeed compiles its communication for ranks on CPUs, once per environment: a minute or two"
                print(f"{said}; `cosmos-scale setup` does it beforehand", file=sys.stderr, flush=True)
        check_room()
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its communication library at every start
        if not use_cuda:
            load_cpu_communication()  # DeepSpeed would do it too, with a traceback where it fails
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    if not use_cuda and "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one host share its cores; torch would give all cores to every rank.
        torch.set_num_threads(max(1, usable_cores() // ranks_of_this_host(unknown=dist.get_world_size())))
    atexit.register(_leave)
    control = dist.new_group(backend="gloo")
    assert isinstance(control, dist.ProcessGroup), "every rank is a member"
    if not use_cuda:
        dist.barrier(control)  # each rank has opened the shared memory of all ranks before it comes here
        delete_name()
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cuda", local_rank) if use_cuda else torch.device("cpu"),
        control=control,
        contact=_contacts[0],
    )


def _use_own_device() -> int:
    """Let torch use the GPU of this rank, and return its number."""
    local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= devices:
        raise WrongRankVariable(
            f"LOCAL_RANK: {local_rank}, but torch sees {devices} CUDA devices; rule: a GPU for each rank of a host (0 "
            "where each rank sees its own alone)"
        )
    use_expandable_segments()
    torch.cuda.set_device(local_rank)
    return local_rank


def _join(backend: str) -> None:
    """Join the process group named by the launcher's environment, or make a group of one, without a port."""
    place = read_rank_variables()
    if place is None:
        _be_alone(backend)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    else:
        from deepspeed.constants import default_pg_timeout

        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # whose agent has the port
        store, contact = (meet_at_agent if of_torchrun else meet)(place)
        _keep_contact(contact)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=default_pg_timeout
        )


def _be_alone(backend: str) -> None:
    """Make a group of this process; raises UserError where gloo, which listens there too, finds no interface."""
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    except RuntimeError as error:
        if "interface" not in str(error):
            raise
        cause = " ".join(str(error).partition("] ")[2].split()) or str(error)
        raise UserError(
            f"this host's network: {cause}; rule: an interface is up, be it the loopback (ip link set lo up), and "
            "GLOO_SOCKET_IFNAME names one or is unset"
        ) from error


def _keep_contact(contact: Contact) -> None:
    """Watch the other ranks from now on: torch's groups wait half an hour for a rank that ends while they are made."""
    _contacts.append(contact)
    contact.watch()


def choose_device(device: str) -> torch.device:
    """Return what ranks compute on, without the number of a rank's own GPU, and let DeepSpeed know.

    device: auto, cpu or cuda. Raises UserError where cuda is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda', but torch sees no CUDA device; rule: use auto or cpu on this machine")
    chosen = "cuda" if uses_gpu(device) else "cpu"
    # Without this DeepSpeed probes for an accelerator, and warns when it finds none.
    named = os.environ.setdefault("DS_ACCELERATOR", chosen)
    if named not in ("cpu", "cuda"):
        raise UserError(f"DS_ACCELERATOR: {named!r}; rule: cpu or cuda, or unset: then the config's device says which")
    if named != chosen:
        raise UserError(
            f"DS_ACCELERATOR: {named!r}, but device {device} means {chosen} on this machine; rule: unset it, or set "
            "both alike"
        )
    return torch.device(chosen)


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on now.

    Who is to listen there may first import for seconds. So it is, where possible, none of the ports that the kernel
    gives to outgoing connections meanwhile.
    """
    low = FIRST_PORT
    with contextlib.suppress(OSError, ValueError):
        low = int(read_regular(Path("/proc/sys/net/ipv4/ip_local_port_range")).split()[0])
    for _ in range(PORTS_TRIED if low > FIRST_PORT else 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := FIRST_PORT + secrets.randbelow(low - FIRST_PORT)))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        given: int = probe.getsockname()[1]
        return given


def check_precision(precision: str) -> None:
    """Raise UserError where this rank's device does not compute in a precision (fp32, bf16, fp16)."""
    from deepspeed.accelerator import get_accelerator  # here, since it takes seconds and --help should not

    device = get_accelerator()
    supported = {"fp32": True, "bf16": device.is_bf16_supported(), "fp16": device.is_fp16_supported()}
    if not supported[precision]:
        others = " or ".join(name for name, here in supported.items() if here)
        raise UserError(f"precision: {precision!r}, but this {device.device_name()} lacks it; rule: use {others} here")


def raise_together(ranks: Ranks, error: UserError | None) -> None:
    """Raise the lowest failing rank's error on every rank, a JointError; returns when no rank has one. Collective."""
    text = None if error is None else f"{error}{_place(ranks)}"
    failed = next((text for text in from_all(text, ranks) if text is not None), None)
    if failed is not None:
        raise JointError(failed)


def _place(ranks: Ranks) -> str:
    """Return a rank's number, in words behind a message, and its host where the ranks have several."""
    if ranks.world_size == 1:
        return ""
    all_here = ranks_of_this_host(unknown=ranks.world_size) == ranks.world_size
    return f" (rank {ranks.rank}{'' if all_here else f' on host {socket.gethostname()}'})"


def lost_contact(error: BaseException) -> bool:
    """Return whether an error means that another rank has ended or cannot be reached."""
    if isinstance(error, LostRank | dist.DistError):
        return True
    # gloo raises plain RuntimeErrors.
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "onnection", "NCCL"))


def tell_lost_contact(error: BaseException, rank: str, more: str, *, command: str = "train") -> None:
    """Print on one line which rank is lost, as far as this process learns it; from then on it keeps its groups.

    error: one that is a `lost_contact`. rank: this one. more: the line's end. command: the one that lost
    it. A process prints one such line.
    """
    contact = _contacts[0] if _contacts else Contact(int(rank), {})
    lost = contact.lost_within(NAMED_WITHIN)
    what = lost or f"it has ended or cannot be reached ({str(error).splitlines()[0]})"
    contact.tell(f"cosmos-scale {command}: rank {rank} lost contact with another rank: {what}; {more}")


def maxima(values: Sequence[float], ranks: Ranks) -> list[float]:
    """Return the largest of all ranks' values, place by place; no device takes part. Collective."""
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=ranks.control)
    found: list[float] = largest.tolist()
    return found


def gather_rows(tensor: Tensor) -> Tensor:
    """Gather [n, ...], of one shape on all ranks, on the group's device, to [W n, ...] in rank order. Collective."""
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, tensor.contiguous())
    return torch.cat(pieces)


def from_all(value: Value, ranks: Ranks) -> list[Value]:
    """Return the values of all ranks, in rank order, on every rank; values are pickled. Collective."""
    values = [value] * ranks.world_size
    dist.all_gather_object(values, value, group=ranks.control)
    return values


def _leave() -> None:
    # Where a rank is lost, destroying groups could wait for ever.
    if dist.is_initialized() and not any(contact.broken for contact in _contacts):
        dist.destroy_process_group()
