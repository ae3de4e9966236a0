"""What a caller has set in torch changes nothing of a loaded model, and holds again afterwards."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import pytest
import torch

import cosmos_scale
from cosmos_scale.inference.torch_state import usual_torch
from tests.inference.conftest import Saved


def results(saved: Saved) -> list[torch.Tensor]:
    """One of each thing that a loaded model computes."""
    model, files = cosmos_scale.load(saved.run, device="cpu"), saved.files()
    shares = model.attention_maps(files[0], "a cat on a mat").image_map
    labels = model.segment(files[0], ["cat", "dog"]).labels
    cosines = model.classify(files, ["cat", "dog"]).cosines
    prepared = torch.ones(2, 3, model.image_size, model.image_size, dtype=torch.float32, device="cpu")
    features = [model.encoder.images(prepared), model.encoder.texts(["a cat"])]
    return [model.encode_image(files), model.encode_text(["a cat"]), cosines, labels, shares, *features]


@pytest.mark.parametrize(
    ("dtype", "block"),
    [
        (torch.float64, nullcontext),
        (torch.bfloat16, nullcontext),
        (torch.float16, nullcontext),
        (torch.float32, lambda: torch.device("meta")),
        (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
        (torch.float32, torch.inference_mode),
    ],
)
def test_nothing_that_is_set_changes_what_is_computed(
    saved: Saved, dtype: torch.dtype, block: Callable[[], AbstractContextManager[object]]
) -> None:
    expected = results(saved)
    torch.set_default_dtype(dtype)
    try:
        with block():
            device, autocast = torch.get_default_device(), torch.is_autocast_enabled("cpu")
            found = results(saved)
            assert torch.get_default_dtype() == dtype
            assert (torch.get_default_device(), torch.is_autocast_enabled("cpu")) == (device, autocast)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@contextmanager
def another_thread_that_computes() -> Iterator[None]:
    """In this block a thread is within `usual_torch`."""
    inside, leave = threading.Event(), threading.Event()

    def compute() -> None:
        with usual_torch():
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        assert inside.wait(60)
        yield
    finally:
        leave.set()
        thread.join()


def test_a_thread_that_ends_leaves_float32_to_those_that_still_compute() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with ExitStack() as first:
            first.enter_context(another_thread_that_computes())
            with usual_torch():
                first.close()
                assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_process_forked_while_a_thread_computes_has_what_the_caller_has_set() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with another_thread_that_computes():
            child = os.fork()
            if not child:
                before = torch.get_default_dtype()
                with usual_torch():
                    within = torch.get_default_dtype()
                after = torch.get_default_dtype()
                os._exit((before, within, after) != (torch.float64, torch.float32, torch.float64))
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_default_dtype(torch.float32)


FORKING = """
import multiprocessing, signal, sys, torch, cosmos_scale

torch.set_num_threads(2)
model = cosmos_scale.load(sys.argv[1], device="cpu")
files = sys.argv[2:]
expected = model.encode_image(files)
torch.randn(800, 800) @ torch.randn(800, 800)  # which is sure to take both threads


def use():
    signal.alarm(60)
    torch.randn(800, 800) @ torch.randn(800, 800)
    assert (model.encode_image(files) - expected).abs().max() < 1e-6


child = multiprocessing.get_context("fork").Process(target=use)
child.start()
child.join()
sys.exit(child.exitcode != 0)
"""


def test_a_forked_process_can_use_a_model(saved: Saved) -> None:
    command = [sys.executable, "-c", FORKING, str(saved.run), *map(str, saved.files())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
