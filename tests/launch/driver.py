"""`cosmos-scale launch` with other ranks and other hosts, for tests: `python -m tests.launch.driver FOLDER JSON WORDS`.

JSON: the fields of LaunchedRun that differ, and "hosts", a list of [name, slots], or of such lists, one an attempt.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cosmos_scale.cli.main import exit_status
from cosmos_scale.cli.output import lasting_output
from cosmos_scale.config.load import make_config
from cosmos_scale.launch.hostfile import Host
from cosmos_scale.launch.printer import Printer
from cosmos_scale.launch.signals import StopSignals
from cosmos_scale.launch.supervise import LaunchedRun, Meeting, Supervisor


def drive() -> int:
    folder, fields, words = Path(sys.argv[1]), json.loads(sys.argv[2]), tuple(sys.argv[3:])
    by_attempt = [[Host(name, slots) for name, slots in hosts] for hosts in fields.pop("hosts")]
    tree = {"name": folder.name, "output": str(folder.parent), "train": {"global_batch": fields.pop("batch", 8)}}
    tree["resume"] = fields.pop("resume", "auto")
    run = LaunchedRun(str(folder), words, make_config(tree), program="tests.launch.rank", back_off=0.1, **fields)
    attempts = iter(by_attempt)

    def look(hosts: Sequence[Host], is_first: bool) -> Meeting:
        here = next(attempts, by_attempt[-1])
        return Meeting(here, "127.0.0.1", 29500, {host.name: {"GLOO_SOCKET_IFNAME": "lo"} for host in here})

    with lasting_output():
        printer = Printer()
        try:
            with StopSignals() as stop:
                return Supervisor(run, by_attempt[0], look, printer, stop).run()
        finally:
            printer.close()


if __name__ == "__main__":
    sys.exit(exit_status("cosmos-scale launch", drive))
