"""Hosts that are namespaces of this machine: each has an ssh server, a network, processes, a name and a /dev/shm.

All hosts share the machine's files. Their network cards are joined by a bridge in a namespace of its own, so nothing of
the machine's own network is touched. The kernel removes a namespace with its last process, and the first process of
each gets SIGKILL from the kernel when the process that made the hosts ends, in whatever way: nothing is left.

A host resolves no name, not even its own: `/etc/hosts` has localhost alone. ssh knows the hosts by its configuration.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_PACKAGES = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client"}
_UNSHARE = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
_OWN_PLACES = "mount -t tmpfs tmpfs /run && mkdir /run/sshd && mount -t tmpfs tmpfs /dev/shm"
_TRIAL = (
    f"hostname trial && {_OWN_PLACES} && ip link add switch type bridge && ip link add veth0 type veth peer name veth1"
)
_SUBNET = "10.77.0"
_SECONDS = 20.0  # for a server to start, or a command of the setup

_SERVER_CONFIG = """\
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/id.pub
PasswordAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
MaxStartups 100
"""
_CLIENT_CONFIG = """\
Host {name}
  HostName {address}
  User root
  IdentityFile {folder}/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def hosts_missing(*programs: str) -> str | None:
    """Return why this machine cannot have hosts, with other programs that they are to have; None where it can."""
    if os.geteuid() != 0:
        return "needs root"
    for program in (*_PACKAGES, *programs):
        if shutil.which(program, path=_PATH) is None:
            return f"needs {program}: apt-get install {_PACKAGES.get(program, program)}"
    tried = subprocess.run([*_UNSHARE, "sh", "-c", _TRIAL], capture_output=True, text=True, timeout=_SECONDS)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


class HostProgram:
    """A program under way on a host, which leads a session of its own; its output goes to two files."""

    def __init__(self, entry: "subprocess.Popen[bytes]", out: Path, err: Path) -> None:
        """entry: the process that has entered the host, and waits for its only child, the program."""
        self._entry, self._out, self._err = entry, out, err

    def signal(self, number: int, *, whole_group: bool = False) -> None:
        """Signal the program, or its process group, as a terminal does with Ctrl-C."""
        with suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(_child_of(self._entry), number)

    @property
    def ended(self) -> bool:
        """Whether the program has ended."""
        return self._entry.poll() is not None

    def wait(self, seconds: float) -> int:
        """Return the exit status, a signal's number below 0; raises AssertionError where the program runs longer."""
        try:
            return self._entry.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s\n{self.output}\n{self.errors}") from None

    @property
    def output(self) -> str:
        """What it has printed on standard output so far."""
        return self._out.read_text(errors="replace")

    @property
    def errors(self) -> str:
        """What it has printed on standard error so far."""
        return self._err.read_text(errors="replace")


class NamespaceHost:
    """One host. name: as ssh takes it. address: of its network card, eth0."""

    def __init__(self, name: str, number: int, folder: Path, switch: int) -> None:
        """number: from 1 on. folder: of the keys. switch: a process in the bridge's namespace."""
        self.name, self.address = name, f"{_SUBNET}.{number}"
        self._card = f"02:00:00:00:00:{number:02x}"  # the same after each boot: others keep it for a while
        self._folder, self._switch = folder, switch
        self._boots = self._programs = 0
        self._unshare: subprocess.Popen[bytes] | None = None
        self._log = folder / f"sshd-{name}.log"

    def boot(self) -> None:
        """Start the host; its network card is plugged in."""
        self._boots += 1
        self._port = f"{self.address.rpartition('.')[2]}-{self._boots}"  # an old one may be there for a while
        binds = {"hosts": "/etc/hosts", "ssh_config": "/etc/ssh/ssh_config"}
        script = [f"hostname {self.name}", "ip link set lo up", _OWN_PLACES]
        script += [f"mount --bind {shlex.quote(str(self._folder / file))} {place}" for file, place in binds.items()]
        server = f"{shutil.which('sshd', path=_PATH)} -D -f {self._folder}/sshd_config -E {self._log}"
        with self._log.open("wb") as err:
            self._unshare = _start_bound([*_UNSHARE, "sh", "-c", " && ".join([*script, f"exec {server}"])], err)
        self._first = _child_of(self._unshare)  # process 1 of the host
        self._namespace = os.readlink(f"/proc/{self._first}/ns/pid")
        card = f"name eth0 address {self._card} netns {self._first}"
        _in_network(self._switch, f"ip link add {self._port} type veth peer {card}")
        self.plug()
        _in_network(self._first, f"ip addr add {self.address}/24 dev eth0", "ip link set eth0 up")
        _wait_until(lambda: "Server listening" in self._said(), f"the ssh server of {self.name}: {self._log}")

    def cut(self) -> None:
        """Pull the plug of the network card: nothing comes or goes, and nobody is told."""
        _in_network(self._switch, f"ip link set {self._port} down")

    def plug(self) -> None:
        """Put the plug of the network card in again."""
        _in_network(self._switch, f"ip link set {self._port} master switch up")

    def lose_power(self) -> None:
        """End the host, with all of its processes, and without a word to the others."""
        self.cut()
        self.halt()

    def halt(self) -> None:
        """End all processes of the host at once."""
        if self._unshare is not None:
            self._unshare.kill()
            self._unshare.wait()
            self._unshare = None

    @contextmanager
    def own_file(self, path: Path, own: Path) -> Iterator[None]:
        """Show this host another file, or folder, in the place of one that it shares with the others."""
        self._enter("mount", "--bind", str(own), str(path))
        try:
            yield
        finally:
            self._enter("umount", str(path))

    def start(
        self, command: Sequence[str], folder: Path, logs: Path, environment: Mapping[str, str] | None = None
    ) -> HostProgram:
        """Start a program on the host, as from a terminal.

        folder: where it runs. logs: the folder of the two files with its output. environment: default: this process's.
        """
        self._programs += 1
        files = [logs / f"{self.name}-{self._boots}-{self._programs}.{kind}" for kind in ("out", "err")]
        entry = ["setsid", "sh", "-c", 'cd "$0" && exec "$@"', str(folder), *command]
        with files[0].open("wb") as out, files[1].open("wb") as err:
            process = subprocess.Popen(
                [*self._entry(), *entry], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        return HostProgram(process, *files)

    def processes(self) -> dict[int, str]:
        """Return the command lines of the host's processes, by their numbers on this machine, without the first one."""
        found = {}
        for folder in Path("/proc").iterdir():
            with suppress(OSError):  # one that ends meanwhile, or is ended and not waited for
                if folder.name.isdecimal() and os.readlink(folder / "ns" / "pid") == self._namespace:
                    found[int(folder.name)] = (
                        (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    )
        found.pop(self._first, None)
        return found

    def rank_pid(self, rank: int) -> int | None:
        """Return the number on this machine of a rank's process, None where it does not run."""
        for pid, command in sorted(self.processes().items()):
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if "-m cosmos_scale.train" in command and f"RANK={rank}".encode() in variables:
                    return pid
        return None

    def end_programs(self) -> None:
        """Kill all programs of the host but its ssh server."""

        def none_left() -> bool:
            found = self.processes()
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not found

        _wait_until(none_left, f"the end of all programs of {self.name}")

    def _entry(self) -> list[str]:
        return ["nsenter", "--target", str(self._first), "--mount", "--uts", "--net", "--pid", "--"]

    def _enter(self, *command: str) -> None:
        subprocess.run([*self._entry(), *command], check=True, timeout=_SECONDS)

    def _said(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


@contextmanager
def namespace_hosts(folder: Path, names: Sequence[str]) -> Iterator[list[NamespaceHost]]:
    """Start hosts that reach each other by ssh without a password, as root; nothing is left of them.

    folder: for keys and logs, a new one. Requires what `hosts_missing` looks for.
    """
    folder.mkdir(mode=0o700)
    for key in ("host_key", "id"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, check=True, timeout=_SECONDS)
    (folder / "sshd_config").write_text(_SERVER_CONFIG.format(folder=folder))
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    switch = _start_bound(["unshare", "--net", "sleep", "infinity"], subprocess.DEVNULL)
    hosts = [NamespaceHost(name, number, folder, switch.pid) for number, name in enumerate(names, start=1)]
    known = (_CLIENT_CONFIG.format(name=host.name, address=host.address, folder=folder) for host in hosts)
    (folder / "ssh_config").write_text("".join(known))
    try:
        _wait_until(lambda: _network_of(switch.pid) != _network_of(os.getpid()), "the bridge's namespace")
        _in_network(switch.pid, "ip link add switch type bridge", "ip link set switch up")
        for host in hosts:
            host.boot()
        yield hosts
    finally:
        for host in hosts:
            host.halt()
        switch.kill()
        switch.wait()


def _start_bound(command: Sequence[str], err: IO[bytes] | int) -> "subprocess.Popen[bytes]":
    """Start a process that the kernel kills when this one ends."""
    bound = ["setpriv", "--pdeathsig", "KILL", *command]
    return subprocess.Popen(bound, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err)


def _in_network(pid: int, *commands: str) -> None:
    """Run commands in the network of a process."""
    entry = ["nsenter", "--target", str(pid), "--net", "sh", "-c", " && ".join(commands)]
    ended = subprocess.run(entry, capture_output=True, text=True, timeout=_SECONDS)
    assert ended.returncode == 0, f"{commands}: {ended.stderr}"


def _network_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _child_of(process: "subprocess.Popen[bytes]") -> int:
    """Return the only child of a process, once there is one; raises ProcessLookupError where the process has ended."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found: list[str] = []

    def known() -> bool:
        if process.poll() is None:
            found[:] = children.read_text().split()
        return bool(found) or process.returncode is not None

    _wait_until(known, f"a child of process {process.pid}")
    if not found:
        raise ProcessLookupError(f"process {process.pid} has ended")
    return int(found[0])


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what} in vain"
        time.sleep(0.01)
