"""What the launcher asks of a host before a launch: a program that runs there, tells facts, and answers questions.

The facts come first. Then the launcher may ask it to listen at the ranks' port, to reach such a port on another host,
and which files in the output folder it sees.
"""

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from cosmos_scale.errors import UserError
from cosmos_scale.files import writing
from cosmos_scale.interfaces import interface_of, own_addresses
from cosmos_scale.launch.wire import Inbox, Message, Outbox
from cosmos_scale.versions import package_versions, sources_digest

TOKEN = ".launch-"  # how the files begin by which hosts see that they share the output folder
CONNECT_SECONDS = 5.0

_DRIVER = Path("/proc/driver/nvidia/version")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SHARED_MEMORY = Path("/dev/shm")


class Looker:
    """Answers one launcher, in its order, until it hangs up; then nothing of it is left on this host."""

    def __init__(self) -> None:
        self._orders, self._answers = Inbox(0), Outbox(1)
        self._token: Path | None = None
        self._listener: socket.socket | None = None

    def run(self) -> None:
        """Answer until the launcher hangs up."""
        self._answers.send({"ready": True})
        try:
            while not self._orders.closed:
                for message in self._orders.messages()[0]:
                    self._answer(message)
                self._answers.flush()
                time.sleep(0.01)
        finally:
            if self._token is not None:
                self._token.unlink(missing_ok=True)
            if self._listener is not None:
                self._listener.close()

    def _answer(self, message: Message) -> None:
        if "look" in message:
            self._answers.send({"facts": self._facts(message["look"])})
        elif "listen" in message:
            self._answers.send({"listens": self._listen(message["listen"])})
        elif "reach" in message:
            self._answers.send({"reached": _reach(message["reach"], message["port"])})
        elif "time" in message:
            self._answers.send({"time": time.time()})
        elif "see" in message:
            folder = Path(message["folder"])
            self._answers.send({"seen": [name for name in message["see"] if (folder / name).exists()]})

    def _facts(self, asked: Message) -> Message:
        os.environ.update(asked["environment"])  # as the ranks will have it: paths of the config may name variables
        facts: Message = {
            "python": sys.version.split()[0],
            "packages": package_versions(),
            "sources": sources_digest(),
            "addresses": own_addresses(),
            "machine": _machine(),
            "ssh": os.environ.get("SSH_CONNECTION", "").split(),
            "errors": {},
        }
        errors: dict[str, str] = facts["errors"]
        with _told(errors, "config"):
            from cosmos_scale.config.load import load_config
            from cosmos_scale.config.shipped import find_run

            config = load_config(find_run(asked["file"]).file, asked["overrides"])
            facts["config"] = config.model_dump(mode="json")
            with _told(errors, "output"):
                self._write_token((config.output / config.name).absolute(), asked["token"])
            # Both imports take seconds.
            from cosmos_scale.data.shards.index import open_sources
            from cosmos_scale.data.training.lost import check_shards

            with _told(errors, "data"):
                index = open_sources(config.data.sources, config.data.remote)
                facts["index"] = index.fingerprint()
                check_shards(index, config, {}, resumed=asked["resumed"])
            facts |= _devices(config.device)
        with suppress(OSError):
            facts["shared_memory"] = shutil.disk_usage(_SHARED_MEMORY).free
        return facts

    def _write_token(self, folder: Path, token: str) -> None:
        path = folder / f"{TOKEN}{token}"
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            self._token = path
            path.write_text("a launch looks whether its hosts share this folder\n")

    def _listen(self, port: int) -> Message:
        """Listen at a port, 0 for a free one, and keep it until the end: the ranks' launch follows at once."""
        try:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self._listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=4096)
        except OSError as error:
            return {"error": error.strerror or str(error)}
        return {"port": self._listener.getsockname()[1]}


@contextmanager
def _told(errors: dict[str, str], name: str) -> Iterator[None]:
    """Keep the message of a UserError, or of a file that cannot be used, under a name."""
    try:
        yield
    except (UserError, OSError) as error:
        errors[name] = str(error)


def _machine() -> str:
    """Return what tells this machine, or this container, from all others; empty where that is unknown."""
    with suppress(OSError):
        return " ".join([_BOOT.read_text().strip(), *(os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net"))])
    return ""


def _devices(device: str) -> Message:
    import torch

    from cosmos_scale.host import uses_gpu

    count = torch.cuda.device_count() if uses_gpu(device) else 0
    driver = ""
    with suppress(OSError):
        found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", _DRIVER.read_text())
        driver = found[1] if found else ""
    return {"gpus": [torch.cuda.get_device_name(number) for number in range(count)], "driver": driver}


def _reach(addresses: list[str], port: int) -> Message | None:
    """Return the first address whose port answers, and this host's interface on the way there; None where none does."""
    attempt: Callable[[str], socket.socket] = lambda address: socket.create_connection(  # noqa: E731
        (address, port), timeout=CONNECT_SECONDS
    )
    for address in addresses:
        with suppress(OSError), closing(attempt(address)) as reached:
            return {"address": address, "interface": interface_of(reached.getsockname()[0])}
    return None


if __name__ == "__main__":
    Looker().run()
