"""Variables of launchers: half set, odd, contradictory: one line each that names the variable, value and rule."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine import rank_variables
from cosmos_scale.engine.comm_build import use_own_environment
from cosmos_scale.engine.rank_variables import (
    RankVariables,
    WrongRankVariable,
    adopt_rank_variables,
    check_nccl_interfaces,
    read_rank_variables,
)
from cosmos_scale.engine.ranks import FIRST_PORT, choose_device, free_port
from cosmos_scale.errors import UserError
from cosmos_scale.testing.runs import write_run

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2,2",
    "SLURM_NODEID": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_SIZE": "12",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "9", "PMI_SIZE": "12", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SOUND = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*NAMES, *SRUN, *OPEN_MPI, *MPICH):
        monkeypatch.delenv(name, raising=False)
    before = {**os.environ}
    yield
    for name in NAMES:  # those that were adopted
        if name not in before:
            os.environ.pop(name, None)


def set_to(monkeypatch: pytest.MonkeyPatch, changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "harmless", [{}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "0"}, {"MASTER_ADDR": "x", "MASTER_PORT": "y"}], ids=str
)
def test_one_process_needs_no_variable(harmless: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, harmless)
    assert read_rank_variables() is None


@pytest.mark.parametrize("alone", [True, False])
def test_an_unknown_network_interface_is_named(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo alone ends the launch in a traceback, also that of a process alone."""
    variables: dict[str, str | None] = {} if alone else {**SOUND}
    set_to(monkeypatch, variables)
    for known in ("", "lo", "e"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", known)
        assert (read_rank_variables() is None) == alone
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ether7")
    with pytest.raises(WrongRankVariable, match=r"^GLOO_SOCKET_IFNAME: 'ether7' is no network .* rule: of .*lo.*, or"):
        read_rank_variables()


@pytest.fixture
def interfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with lo, eth0, eth1 that is down, and ib0 whose cable is out."""
    states = {"lo": ("0x9", "unknown"), "eth0": ("0x1003", "up"), "eth1": ("0x1002", "down"), "ib0": ("0x1003", "down")}
    for name, (flags, state) in states.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "flags").write_text(f"{flags}\n")
        (tmp_path / name / "operstate").write_text(f"{state}\n")
    monkeypatch.setattr(rank_variables, "INTERFACES", tmp_path)
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(states, 1)))


@pytest.mark.usefixtures("interfaces")
@pytest.mark.parametrize("name", ["eth1", "lo,eth1", "ib0"])
def test_a_network_interface_that_is_down_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    down = name.rpartition(",")[2]
    with pytest.raises(WrongRankVariable) as refused:
        read_rank_variables()
    assert str(refused.value) == f"GLOO_SOCKET_IFNAME: '{down}' is down; rule: of lo, eth0, or unset"


@pytest.mark.usefixtures("interfaces")
def test_nccls_interfaces_are_prefixes_whole_names_or_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for fine in ("", "eth", "eth0", "=eth0", "nothing,lo", "^lo", "^docker", "eth0:3"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", fine)
        check_nccl_interfaces()
    for wrong, what in {
        "bond": "means no network interface of this host",
        "=eth": "means no network interface of this host",
        "eth1": "is down (eth1)",
        "^lo,eth0": "is down (eth1, ib0)",
    }.items():
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", wrong)
        with pytest.raises(WrongRankVariable) as refused:
            check_nccl_interfaces()
        assert str(refused.value) == f"NCCL_SOCKET_IFNAME: {wrong!r} {what}; rule: of lo, eth0, or unset"


@pytest.mark.parametrize("launcher", [SRUN, OPEN_MPI, MPICH], ids=["srun", "Open MPI", "MPICH"])
def test_the_variables_of_other_launchers_are_read(launcher: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, {**launcher, **MEETING})
    adopt_rank_variables()
    assert read_rank_variables() == RankVariables(9, 12, 1, "127.0.0.1", 29500)
    assert os.environ["LOCAL_WORLD_SIZE"] == os.environ["LOCAL_SIZE"] == "2"


@pytest.mark.parametrize(
    "harmless",
    [
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script, which is no step
        {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=["batch", "one task", "one rank"],
)
def test_one_task_is_one_process(harmless: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, harmless)
    adopt_rank_variables()
    assert read_rank_variables() is None


def test_variables_of_a_rank_come_before_those_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, {**SRUN, **SOUND})
    adopt_rank_variables()
    assert read_rank_variables() == RankVariables(1, 4, 1, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            SRUN,
            "MASTER_ADDR: is not set, but SLURM_PROCID is; rule: before srun, export MASTER_PORT=29500 MASTER_ADDR=",
        ),
        ({**SRUN, "MASTER_ADDR": "a"}, "MASTER_PORT: is not set, but SLURM_PROCID is; rule: before srun"),
        ({**SRUN, **MEETING, "SLURM_LOCALID": None}, "SLURM_LOCALID: is not set, but SLURM_STEP_NUM_TASKS is"),
        (
            {**SRUN, **MEETING, "WORLD_SIZE": "4"},
            "WORLD_SIZE: 4, but SLURM_STEP_NUM_TASKS is 12; rule: ",
        ),
        ({**OPEN_MPI}, "MASTER_ADDR: is not set, but OMPI_COMM_WORLD_RANK is; rule: mpirun -x MASTER_ADDR=HOST"),
        ({**MPICH, **MEETING, "PMI_SIZE": "many"}, "PMI_SIZE: 'many'; rule: a whole number of at least 1"),
    ],
    ids=str,
)
def test_a_half_set_launcher_is_refused(
    changes: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to(monkeypatch, changes)
    with pytest.raises(WrongRankVariable) as refused:
        adopt_rank_variables()
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_a_whole_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, {**SOUND, "LOCAL_WORLD_SIZE": "2"})
    assert read_rank_variables() == RankVariables(1, 4, 1, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            ({name: number}, f"{name}: '{number[:80]}'; rule: a whole number of at most 1000000")
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
            for number in ("9" * 20, "9" * 5000, "1000001")
        ),
        ({"MASTER_PORT": "9" * 5000}, f"MASTER_PORT: '{'9' * 80}'; rule: a whole number from 1 to 65535"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE: is not set, but RANK is; rule: a launcher sets both"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK: is not set, but RANK is; rule: a launcher sets both (under SLURM: "),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: is not set, but RANK is"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR: is not set, but RANK is"),
        ({"MASTER_PORT": None}, "MASTER_PORT: is not set, but RANK is"),
        ({"RANK": None}, "WORLD_SIZE: 4, but RANK is not set; rule: a launcher sets both; to train in one process, "),
        ({"RANK": None, "WORLD_SIZE": None}, "LOCAL_RANK: 1, but RANK is not set"),
        ({"RANK": None, "WORLD_SIZE": "many"}, "WORLD_SIZE: 'many'; rule: a whole number of at least 0"),
        ({"RANK": ""}, "RANK: is set to nothing; rule: it has a value, or is unset"),
        ({"RANK": "4"}, "RANK: 4, but WORLD_SIZE is 4; rule: ranks are numbered from 0"),
        ({"RANK": "-1"}, "RANK: '-1'; rule: a whole number of at least 0"),
        ({"RANK": "1.0"}, "RANK: '1.0'; rule: a whole number"),
        ({"RANK": "٣"}, "RANK: '٣'; rule: a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0'; rule: a whole number of at least 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: is set to nothing"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK: 'one'; rule: a whole number of at least 0"),
        ({"LOCAL_RANK": "7"}, "LOCAL_RANK: 7, but WORLD_SIZE is 4"),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK: 3, but LOCAL_WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "3", "LOCAL_SIZE": "2"}, "LOCAL_RANK: 3, but LOCAL_SIZE is 2"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE: 'two'; rule: a whole number of at least 1"),
        ({"LOCAL_SIZE": ""}, "LOCAL_SIZE: is set to nothing"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: 'http'; rule: a whole number from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: '0'; rule: a whole number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT: '65536'; rule: a whole number from 1 to 65535"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: is set to nothing"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR: 'no.such.host.invalid' cannot be resolved here ("),
        ({"MASTER_ADDR": "a" * 70 + ".invalid"}, "MASTER_ADDR: 'aaa"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, {**SOUND, **changes})
    with pytest.raises(WrongRankVariable) as refusal:
        read_rank_variables()
    assert str(refusal.value).startswith(said)
    assert "\n" not in str(refusal.value)
    assert "; rule: " in str(refusal.value)


@pytest.mark.parametrize(("rank", "local_rank"), [("1", "x"), ("1", None), ("3", "1")])
def test_each_rank_prints_its_own_line(rank: str, local_rank: str | None, tmp_path: Path, scenes: SceneShards) -> None:
    """The command itself: an odd rank that is not the first on its host prints too, and waits for nobody."""
    run = write_run(tmp_path, scenes)
    own = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if local_rank is not None:
        own["LOCAL_RANK"] = local_rank
    command = [sys.executable, "-m", "cosmos_scale.cli", "train", str(run)]
    ended = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"cosmos-scale train: (LOCAL_RANK|RANK): .*; rule: .*\n", ended.stderr), ended.stderr


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-n", "true"], check=False).returncode != 0,
    reason="may not make a namespace of the network, as in unshare -n",
)
def test_a_host_without_any_network_is_one_line(tmp_path: Path, scenes: SceneShards) -> None:
    """In a sandbox whose loopback is down."""
    run = write_run(tmp_path, scenes)
    command = ["unshare", "-n", sys.executable, "-m", "cosmos_scale.cli", "train", str(run)]
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    said = (
        r"cosmos-scale train: this host's network: .*Unable to find .*; rule: an interface is up, be it the loopback "
    )
    assert re.match(said, ended.stderr.splitlines()[-1]), ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("value", ["foo", "", "CPU", "xpu"])
def test_an_accelerator_that_no_run_computes_on_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", value)
    with pytest.raises(UserError, match=rf"^DS_ACCELERATOR: '{value}'; rule: cpu or cuda, or unset"):
        choose_device("cpu")


def test_an_accelerator_that_is_not_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be left over from a host with GPUs: DeepSpeed would look for one only when the engine is built."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(
        UserError, match=r"^DS_ACCELERATOR: 'cuda', but device cpu means cpu on this machine; rule: unset"
    ):
        choose_device("cpu")


@pytest.mark.parametrize("value", ["cpu", None])
def test_an_accelerator_that_is_the_device_is_taken(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, {"DS_ACCELERATOR": value})
    assert choose_device("cpu").type == "cpu"
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_a_folder_of_extensions_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/none")
    with pytest.raises(UserError, match=r"^TORCH_EXTENSIONS_DIR: /proc/none: .*; rule: a folder that can be made$"):
        use_own_environment()


def test_a_free_port_is_none_that_the_kernel_gives_to_others() -> None:
    """Else an outgoing connection may have it by the time that a rank listens there, after its imports."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first <= FIRST_PORT:
        pytest.skip(f"this machine gives ports from {first} on to outgoing connections")
    ports = [free_port() for _ in range(20)]
    assert all(FIRST_PORT <= port < first for port in ports)
    assert len(set(ports)) > 10  # two launches of one moment seldom get the same
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass
