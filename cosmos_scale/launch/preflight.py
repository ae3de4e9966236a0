"""The look at all hosts before a launch: at the same time on each, compared, refused with host and remedy."""

import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_scale.config import RunConfig
from cosmos_scale.config.compare import different_between_hosts
from cosmos_scale.errors import UserError
from cosmos_scale.interfaces import LOOPBACK
from cosmos_scale.launch.connection import Connection, passed_environment
from cosmos_scale.launch.hostfile import Host
from cosmos_scale.launch.look import TOKEN
from cosmos_scale.launch.signals import StoppedEarly, StopSignals
from cosmos_scale.launch.supervise import LaunchedRun, Meeting
from cosmos_scale.launch.wire import Message
from cosmos_scale.run.folder import CHECKPOINTS
from cosmos_scale.words import counted, table_row

LOOKER = "cosmos_scale.launch.look"
FACTS_SECONDS = 120.0  # for the slowest host: the imports, from a file server that all hosts ask at once
ANSWER_SECONDS = 30.0
CLOCK_SECONDS = 5.0  # by which clocks may differ
# Bytes of /dev/shm that a rank needs at least: DeepSpeed's communication on one host's CPUs; else NCCL's and loaders'.
SHARED_BY_CPU_RANK, SHARED_BY_RANK = 67 * 2**20, 32 * 2**20

OK, NOTE, REFUSED_ROW = "ok", "note", "REFUSED"


class Row(NamedTuple):
    """One thing that was looked at on all hosts. verdict: ok, note or REFUSED."""

    name: str
    verdict: str
    text: str


class Preflight:
    """What one look at some hosts found. rows: in the order of the table. meeting: where the ranks may meet."""

    def __init__(self, run: LaunchedRun, hosts: Sequence[Host], stop: StopSignals | None = None) -> None:
        """stop: ends the look early, by StoppedEarly."""
        self._stop = stop
        self.rows: list[Row] = []
        self.gone: dict[str, str] = {}  # the hosts that do not answer, and why
        self._run = run
        self._facts: dict[str, Message] = {}
        self._hosts = list(hosts)
        self._open: dict[str, Connection] = {}
        self.meeting: Meeting | None = None

    def look(self) -> None:
        """Look at all hosts; what is wrong stands in the rows."""
        began = time.monotonic()
        token = secrets.token_hex(8)
        try:
            for host in self._hosts:
                self._open[host.name] = Connection(host, LOOKER, Path.cwd())
            asked = {
                "file": self._run.file,
                "overrides": list(self._run.overrides),
                "resumed": self._is_resumed(),
                "environment": passed_environment(),
            }
            for place, name in enumerate(self._open):
                self._send(name, {"look": asked | {"token": f"{token}-{place}"}})
            self._facts = self._answers(self._open, "facts", FACTS_SECONDS)
            self._hosts = [host for host in self._hosts if host.name not in self.gone]
            for name, reason in self.gone.items():
                self._refuse(
                    "hosts", f"{name} does not answer: {reason}; rule: ssh without a password, and this folder"
                )
            if self._hosts:
                self._compare(token)
        finally:
            for connection in self._open.values():
                connection.close()
            for connection in self._open.values():
                connection.hang_up()
        if not self.gone:
            took = time.monotonic() - began
            self.rows.insert(
                0, Row("hosts", OK, f"{counted(len(self._hosts), 'host')} answered; looked at in {took:.1f} s")
            )

    def table(self) -> str:
        """Return the table of what was found."""
        return "\n".join(table_row(f"  {row.name:<14}{row.verdict:<10}", row.text) for row in self.rows)

    def require(self) -> Meeting:
        """Return where the ranks meet; raises UserError where anything was refused."""
        refused = [row for row in self.rows if row.verdict == REFUSED_ROW]
        if refused:
            more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
            raise UserError(f"{refused[0].name}: {refused[0].text}{more}")
        assert self.meeting is not None
        return self.meeting

    def _compare(self, token: str) -> None:
        self._same("python", [facts["python"] for facts in self._all()], "install one version of Python")
        self._packages()
        self._same(
            "sources", [facts["sources"] for facts in self._all()], "the same files of cosmos_scale on each host"
        )
        if self._errors("config", "the run's file and its bases are on each host"):
            return
        self._config()
        if not self._errors("data", "each host has the shards, or reads them from a store"):
            indexes = [facts["index"] for facts in self._all()]
            self._same("index", indexes, "copy the index along with the shards")
        self._output(token)
        self._devices()
        self._clock()
        self._network()

    def _all(self) -> list[Message]:
        return [self._facts[host.name] for host in self._hosts]

    def _refuse(self, name: str, text: str) -> None:
        self.rows.append(Row(name, REFUSED_ROW, text))

    def _errors(self, name: str, rule: str) -> bool:
        """Refuse what hosts could not do; returns whether there was any."""
        errors = {host.name: facts["errors"].get(name) for host, facts in zip(self._hosts, self._all(), strict=True)}
        by_text: dict[str, list[str]] = {}
        for host, text in errors.items():
            if text is not None:
                by_text.setdefault(text, []).append(host)
        for text, hosts in by_text.items():
            where = f"{_listed(hosts)}: " if len(self._facts) > 1 else ""
            self._refuse(name, f"{where}{text}" + (f"; rule: {rule}" if len(hosts) < len(self._hosts) else ""))
        return bool(by_text)

    def _same(self, name: str, values: Sequence[str], rule: str) -> None:
        """Refuse hosts that differ in a value."""
        hosts: dict[str, list[str]] = {}
        for host, value in zip(self._hosts, values, strict=True):
            hosts.setdefault(value, []).append(host.name)
        if len(hosts) == 1:
            self.rows.append(Row(name, OK, values[0]))
            return
        # The hosts of the most common value are right, as far as anybody can tell.
        common = max(hosts, key=lambda value: len(hosts[value]))
        odd = "; ".join(f"{_listed(some)} has {value}" for value, some in hosts.items() if value != common)
        self._refuse(name, f"{odd}, {_listed(hosts[common])} has {common}; rule: {rule}")

    def _packages(self) -> None:
        names = sorted({name for facts in self._all() for name in facts["packages"]})
        differing = [name for name in names if len({facts["packages"].get(name) for facts in self._all()}) > 1]
        for name in differing:
            values = [str(facts["packages"].get(name, "none")) for facts in self._all()]
            self._same(f"package {name}"[:14], [f"{name} {value}" for value in values], "install one version of it")
        if not differing:
            shown = ", ".join(f"{name} {self._all()[0]['packages'].get(name)}" for name in ("torch", "deepspeed"))
            self.rows.append(Row("packages", OK, f"{counted(len(names), 'package')}: {shown}"))

    def _config(self) -> None:
        configs = [RunConfig.model_validate(facts["config"]) for facts in self._all()]
        for host, config in zip(self._hosts, configs, strict=True):
            # A file that was edited since would start another run under this launch; other hosts may mount elsewhere.
            folder = (config.output / config.name).absolute()
            if folder != self._run.folder and (host.is_here or config.name != self._run.config.name):
                self._refuse(
                    "config",
                    f"{self._run.file} on {host.name}: the run is {folder}, but this launch is of {self._run.folder}; "
                    "rule: name and output stay while a launch goes on",
                )
                return
        equal = True
        for host, config in zip(self._hosts[1:], configs[1:], strict=True):
            if different := different_between_hosts(configs[0], config):
                equal = False
                keys = ", ".join(different)
                self._refuse("config", f"{host.name} and {self._hosts[0].name} differ in {keys}; rule: one run's keys")
        if equal:
            self.rows.append(Row("config", OK, f"{self._run.file}: {configs[0].name}"))

    def _output(self, token: str) -> None:
        if self._errors("output", "a folder that every host may write to"):
            return
        names = [f"{TOKEN}{token}-{place}" for place in range(len(self._open))]
        wanted = {f"{TOKEN}{token}-{place}" for place, name in enumerate(self._open) if name not in self.gone}
        folders = {}
        for host, facts in zip(self._hosts, self._all(), strict=True):
            folders[host.name] = str(Path(facts["config"]["output"], facts["config"]["name"]).absolute())
            self._send(host.name, {"see": names, "folder": folders[host.name]})
        seen = self._answers(self._here(), "seen", ANSWER_SECONDS)
        blind = [host.name for host in self._hosts if not wanted <= set(seen.get(host.name, []))]
        if blind:
            rule = "rule: output is one folder that all hosts share"
            self._refuse(
                "output", f"{_listed(blind)} does not see the other hosts' files in {folders[blind[0]]}; {rule}"
            )
        else:
            shared = "is shared and can be written to" if len(self._hosts) > 1 else "can be written to"
            self.rows.append(Row("output", OK, f"{folders[self._hosts[0].name]} {shared}"))

    def _devices(self) -> None:
        on_gpus = [host.name for host, facts in zip(self._hosts, self._all(), strict=True) if facts["gpus"]]
        refused, machines = len(self.rows), dict[str, str]()
        for host, facts in zip(self._hosts, self._all(), strict=True):
            if on_gpus and len(facts["gpus"]) < host.slots:
                has = counted(len(facts["gpus"]), "GPU")
                self._refuse(
                    "GPUs", f"{host.name} has {has} for {counted(host.slots, 'rank')}; rule: no more slots than GPUs"
                )
            twin = next((name for name, machine in machines.items() if machine == facts.get("machine")), None)
            if on_gpus and twin is not None:
                self._refuse(
                    "GPUs", f"{host.name} and {twin} are one machine; rule: one line a machine in the hostfile"
                )
            if facts.get("machine"):
                machines[host.name] = facts["machine"]
            needed = host.slots * (SHARED_BY_RANK if on_gpus or len(self._hosts) > 1 else SHARED_BY_CPU_RANK)
            free = facts.get("shared_memory", needed)
            if free < needed:
                self._refuse(
                    "/dev/shm",
                    f"{host.name} has {free >> 20} MiB left, {counted(host.slots, 'rank needs', 'ranks need')} "
                    f"{needed >> 20}; rule: "
                    "enlarge it (docker run --shm-size, mount -o remount,size=), or delete what ended launches left",
                )
        if len(self.rows) == refused:
            least = min((facts.get("shared_memory", 0) for facts in self._all()), default=0)
            self.rows.append(Row("/dev/shm", OK, f"at least {least / 2**30:,.1f} GiB free"))
            kinds = sorted({f"{gpu}, driver {facts['driver']}" for facts in self._all() for gpu in facts["gpus"]})
            shown = f"{'; '.join(kinds)}" if kinds else "none: ranks compute on CPUs"
            self.rows.append(Row("GPUs", NOTE if len(kinds) > 1 else OK, shown))

    def _clock(self) -> None:
        differences = {}
        for host in self._hosts:
            sent = time.time()
            self._send(host.name, {"time": True})
            answer = self._answers({host.name: self._open[host.name]}, "time", ANSWER_SECONDS)
            if host.name in answer:
                differences[host.name] = float(answer[host.name]) - (sent + time.time()) / 2
        wrong = {name: difference for name, difference in differences.items() if abs(difference) > CLOCK_SECONDS}
        for name, difference in wrong.items():
            self._refuse("clock", f"{name} is {difference:+.1f} s off this host's; rule: set clocks by NTP")
        if differences and not wrong:
            self.rows.append(Row("clock", OK, f"within {max(map(abs, differences.values())):.1f} s"))

    def _network(self) -> None:
        """Find the port and the address of the first host, and each host's interface on the way there."""
        first = self._hosts[0].name
        wanted = os.environ.get("MASTER_PORT", "0")
        if not (wanted.isascii() and wanted.isdecimal() and int(wanted[:6]) <= 65535):
            self._refuse("network", f"MASTER_PORT: {wanted!r}; rule: a whole number up to 65535, or unset")
            return
        self._send(first, {"listen": int(wanted)})
        listens = self._answers({first: self._open[first]}, "listens", ANSWER_SECONDS).get(
            first, {"error": "no answer"}
        )
        if "error" in listens:
            rule = "rule: a free port, or unset MASTER_PORT"
            self._refuse("network", f"MASTER_PORT: {wanted} of {first}: {listens['error']}; {rule}")
            return
        port = int(listens["port"])
        candidates = self._candidates()
        reached: dict[str, Any] = {}
        for address in candidates:
            for host in self._hosts:
                self._send(host.name, {"reach": [address], "port": port})
            reached = self._answers(self._here(), "reached", ANSWER_SECONDS)
            if all(reached.get(host.name) for host in self._hosts):
                break
        cut = [host.name for host in self._hosts if not reached.get(host.name)]
        if cut:
            self._refuse(
                "network",
                f"{_listed(cut)} does not reach port {port} of {first} at {', '.join(candidates)}; rule: let the hosts "
                "reach each other at all ports, or set MASTER_ADDR to an address of the first host",
            )
            return
        address = next(iter(reached.values()))["address"]
        ways = {name: found["interface"] for name, found in reached.items()}
        if len({*ways.values()}) > 1:  # MASTER_ADDR may mean loopback on its own host, where others cannot come
            ways = {name: None if way == LOOPBACK else way for name, way in ways.items()}
        interfaces = {name: self._interface(way) for name, way in ways.items()}
        self.meeting = Meeting(self._hosts, address, port, interfaces)
        shown = ", ".join(sorted({f"{name}={value}" for own in interfaces.values() for name, value in own.items()}))
        self.rows.append(Row("network", OK, f"the ranks meet at {address}:{port}{f', {shown}' if shown else ''}"))

    def _candidates(self) -> list[str]:
        """Return the addresses by which the first host may be reached, the likeliest first."""
        if "MASTER_ADDR" in os.environ:
            return [os.environ["MASTER_ADDR"]]
        if len(self._hosts) == 1:
            return ["127.0.0.1"]
        first, *others = self._all()
        as_server = first["ssh"][2:3]  # by which this host has reached it
        as_client = [address for facts in others for address in facts["ssh"][:1]] if self._hosts[0].is_here else []
        return list(dict.fromkeys([*as_server, *as_client, *first["addresses"]]))

    def _interface(self, name: str | None) -> dict[str, str]:
        """Return the variables that name an interface to gloo and NCCL, without those that the user has set."""
        if name is None:
            return {}
        found = {"GLOO_SOCKET_IFNAME": name}
        if len(self._hosts) > 1:
            found["NCCL_SOCKET_IFNAME"] = f"={name}"  # = : NCCL takes names that begin so otherwise
        return {variable: value for variable, value in found.items() if variable not in os.environ}

    def _is_resumed(self) -> bool:
        checkpoints = self._run.folder / CHECKPOINTS
        return any(checkpoints.glob("step-*")) and self._run.config.resume != "never"

    def _here(self) -> dict[str, Connection]:
        return {host.name: self._open[host.name] for host in self._hosts}

    def _send(self, name: str, message: Message) -> None:
        self._open[name].outbox.send(message)

    def _answers(self, asked: dict[str, Connection], key: str, seconds: float) -> dict[str, Any]:
        """Return what hosts answer under a key; those that do not are gone."""
        answers: dict[str, Any] = {}
        deadline = time.monotonic() + seconds
        waiting = dict(asked)
        while waiting and time.monotonic() < deadline:
            if self._stop is not None and self._stop.first is not None:
                raise StoppedEarly
            for name, connection in list(waiting.items()):
                connection.outbox.flush()
                for message in connection.receive()[0]:
                    if key in message:
                        answers[name] = message[key]
                if name in answers:
                    del waiting[name]
                elif connection.has_ended:
                    self.gone[name] = connection.reason()
                    del waiting[name]
                elif obstacle := connection.obstacle:
                    self.gone[name] = obstacle
                    del waiting[name]
            time.sleep(0.01)
        for name in waiting:
            self.gone[name] = f"no answer within {seconds:g} s"
        return answers


def look_at(
    run: LaunchedRun, say: Callable[[str], None], show: Callable[[str], None], stop: StopSignals
) -> Callable[[Sequence[Host], bool], Meeting]:
    """Return what a supervisor looks at hosts with; say gets lines, and show the first look's table."""

    def look(hosts: Sequence[Host], is_first: bool) -> Meeting:
        found = Preflight(run, hosts, stop)
        found.look()
        if is_first:
            show(found.table())
        if not is_first and found.gone and len(found.gone) < len(hosts):
            for name, reason in found.gone.items():
                say(f"host {name} is gone: {reason}")
            found = Preflight(run, [host for host in hosts if host.name not in found.gone], stop)
            found.look()
        return found.require()

    return look


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
