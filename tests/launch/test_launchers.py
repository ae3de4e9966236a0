"""The scripts in launchers/: sound by their own checkers, and a tiny run under each that can run here."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cosmos_scale.data.scenes.scene_shards import SceneShards
from cosmos_scale.engine.ranks import free_port
from cosmos_scale.testing.runs import records, write_run
from tests.conftest import REPOSITORY
from tests.launch.sshd import MISSING, SERVER, two_hosts, write_hostfile

FOLDER = REPOSITORY / "launchers"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])


def run_script(name: str, *arguments: str, seconds: float = 200.0, **environment: str) -> str:
    own = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | environment
    command = [str(FOLDER / name), *arguments]
    ended = subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=seconds)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_there_is_a_script_for_each_way() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {"hostfile.sh", "kubernetes.yaml", "local.sh", "slurm.sbatch", "torchrun.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_sound_and_run(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False, timeout=60)
        assert checked.returncode == 0, checked.stdout


def test_the_pods_run_the_trainer_by_torchrun() -> None:
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    specs = job["spec"]["pytorchReplicaSpecs"]
    assert job["kind"] == "PyTorchJob"
    assert [specs[name]["replicas"] for name in ("Master", "Worker")] == [1, 3]
    for spec in specs.values():
        (container,) = spec["template"]["spec"]["containers"]
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"] == "8"
        assert container["command"][0] == "torchrun"
        module = container["command"][container["command"].index("--module") + 1]
        assert importlib.util.find_spec(module) is not None
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


@pytest.mark.slow
def test_the_command_of_the_pods_trains(tmp_path: Path, scenes: SceneShards) -> None:
    """On this host as the only pod: the operator sets the variables, of which torchrun reads its options."""
    run = write_run(tmp_path, scenes)
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    *command, last = container["command"]
    assert last == "/shared/my_run.yaml"
    variables = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"}
    own = {"PET_MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(run)],
        env=os.environ | variables | own,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert records(run)[-1]["step"] == 8


@pytest.mark.slow
def test_local_ranks(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    run_script("local.sh", "--ranks", "2", str(run))
    assert records(run)[-1]["step"] == 8


@pytest.mark.slow
def test_ranks_of_torchrun(tmp_path: Path, scenes: SceneShards) -> None:
    run = write_run(tmp_path, scenes)
    said = run_script("torchrun.sh", str(run), GPUS="2", PORT=str(free_port()))
    assert "on 2 ranks" in said
    assert records(run)[-1]["step"] == 8


SRUN = """#!/bin/sh
# In the place of Slurm's: two tasks of one node.
shift  # --kill-on-bad-exit=1
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_NODEID=0 "$@" &
  tasks="$tasks $!"
done
for task in $tasks; do wait "$task" || exit 1; done
"""


@pytest.mark.slow
def test_tasks_of_slurm(tmp_path: Path, scenes: SceneShards) -> None:
    """Slurm itself is not here: its two programs are short scripts, which set what Slurm sets."""
    run = write_run(tmp_path, scenes)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    said = run_script("slurm.sbatch", str(run), PATH=path, SLURM_JOB_NODELIST="here", SLURM_JOB_ID=str(free_port()))
    assert "on 2 ranks" in said
    assert records(run)[-1]["step"] == 8


PROGRAM = """#!{python}
import os, signal, sys
if "--check" not in sys.argv:
    assert os.path.isfile(os.environ["DS_ENV_FILE"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print(os.getpid(), " ".join(sys.argv[1:]), open(os.environ["DS_ENV_FILE"]).read().split(), flush=True)
    signal.pause()
"""


def test_a_signal_to_the_script_is_one_to_deepspeed(tmp_path: Path) -> None:
    """Else a script that is ended leaves a launch behind, which trains on."""
    for name in ("deepspeed", "cosmos-scale"):
        (tmp_path / name).write_text(PROGRAM.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TMPDIR": str(tmp_path), "NCCL_DEBUG": "INFO", "LAUNCHER": "pdsh"}
    command = [str(FOLDER / "hostfile.sh"), "hosts", "run.yaml", "name=x"]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        said = script.stdout.readline()
        script.terminate()
        assert script.wait(20) == 7
    arguments = "--hostfile hosts --launcher pdsh --module cosmos_scale.train run.yaml name=x"
    assert said == f"{script.pid} {arguments} ['NCCL_DEBUG=INFO']\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cosmos-scale", "deepspeed"]


@pytest.mark.slow
@pytest.mark.skipif(SERVER is None, reason=MISSING)
@pytest.mark.parametrize("launcher", ["ours", "pdsh"])
def test_ranks_of_a_hostfile(tmp_path: Path, scenes: SceneShards, launcher: str) -> None:
    if launcher == "pdsh" and shutil.which("pdsh") is None:
        pytest.skip("no pdsh here (apt-get install pdsh)")
    run = write_run(tmp_path, scenes)
    with two_hosts(tmp_path / "hosts-of-test") as programs:
        said = run_script(
            "hostfile.sh",
            str(write_hostfile(tmp_path, 1, 1)),
            str(run),
            LAUNCHER=launcher,
            PATH=f"{programs}:{os.environ['PATH']}",
            PDSH_SSH_ARGS_APPEND=f"-F {programs.parent}/ssh_config",
        )
    assert "on 2 ranks" in said
    assert records(run)[-1]["step"] == 8
