"""What all tests share: the repository's root, quiet environments, and the skip of GPU tests where there is none."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from cosmos_scale.data.scenes.scene_shards import SceneShards, build_scenes

REPOSITORY = Path(__file__).resolve().parent.parent

# Set before any test starts ranks or loaders, which inherit them. One thread: tests run beside each other, and sums in
# one order make runs comparable bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("PYTHONUNBUFFERED", None)  # streams with buffers, and with their locks, as users have them
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each program that a test starts compiles this checkout anew
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for others otherwise and warns of each it lacks
torch.set_num_threads(1)
# A shell starts background jobs with Ctrl-C ignored, and nohup ignores the terminal's end. Programs inherit that, and
# the tests send both to them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# The same examples in each run, and no limit of time on one of them: the machine may be busy.
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("suite")
# Programs that tests start are this checkout's, whichever one the environment has installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def _own_interface() -> Iterator[None]:
    """A meeting of ranks in this process tells gloo of an interface, which no later test may find."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    yield
    if before is None:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneShards:
    """80 training pairs and 24 held-out ones, indexed; not to be written to."""
    return build_scenes(tmp_path_factory.mktemp("scenes"), train=80, gallery=24, workers=1)
