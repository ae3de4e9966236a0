"""Two hosts that are this machine: an ssh server on a free port, reached under two names, each with a home of its own.

The second host may have other files: `second` is a shell command that its programs start with.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosmos_scale.engine.ranks import free_port

SERVER = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
MISSING = "no ssh server here (apt-get install openssh-server)"
NAMES = ("worker-a", "worker-b")
SECONDS = 60.0  # for what takes some at most

_SERVER_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
MaxStartups 100
"""
_CLIENT_CONFIG = """\
Host {name}
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/{name}
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile {folder}/known_hosts
"""


@contextmanager
def two_hosts(folder: Path, second: str = ":") -> Iterator[Path]:
    """Start the server; yields a folder with a program `ssh` that knows both hosts, to be put first on PATH."""
    assert SERVER is not None
    folder.mkdir()
    folder.chmod(0o700)
    port, client, keys = free_port(), "", ""
    for name in ("host_key", *NAMES):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, timeout=SECONDS)
    for name, before in zip(NAMES, (":", second), strict=True):
        (folder / f"home-{name}").mkdir()
        start = folder / f"start-{name}"
        start.write_text(f'export HOME={folder}/home-{name}\n{before}\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n')
        keys += f'command="sh {start}" {(folder / f"{name}.pub").read_text()}'
        client += _CLIENT_CONFIG.format(name=name, port=port, folder=folder)
    (folder / "authorized_keys").write_text(keys)
    (folder / "authorized_keys").chmod(0o600)
    (folder / "sshd_config").write_text(_SERVER_CONFIG.format(port=port, folder=folder))
    (folder / "ssh_config").write_text(client)
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where the server asks for it
    log = folder / "log"
    server = subprocess.Popen([SERVER, "-D", "-f", str(folder / "sshd_config"), "-E", str(log)])
    try:
        deadline = time.monotonic() + SECONDS
        while subprocess.run(
            [ssh, "-o", "BatchMode=yes", NAMES[0], "true"], capture_output=True, timeout=SECONDS
        ).returncode:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield ssh.parent
    finally:
        server.terminate()
        server.wait(SECONDS)


def write_hostfile(folder: Path, *slots: int) -> Path:
    file = folder / "hosts"
    file.write_text("".join(f"{name} slots={count}\n" for name, count in zip(NAMES, slots, strict=True)))
    return file
