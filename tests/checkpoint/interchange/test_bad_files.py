"""Files that are no checkpoint which can be read: one line each, nothing executed, nothing read that is not needed."""

import os
import pickle
import resource
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cosmos_scale.checkpoint.interchange.reading import is_public, read_public
from cosmos_scale.checkpoint.interchange.weights import ACCEPTED
from cosmos_scale.errors import UserError
from tests.checkpoint.interchange.made import SIZES, openclip_model, save_cosmos, state_of, towers

GIB = 1 << 30
BLOCK = "transformer.resblocks.0"


class WritesAFile:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"echo executed > {self.path}",)


def refused(path: Path, said: str) -> None:
    """Reading a path is refused on one line that names it, what was found, and what is accepted."""
    with pytest.raises(UserError) as refusal:
        read_public(path, "student")
    text = str(refusal.value)
    assert said in text
    assert text.startswith(f"checkpoint {path}: ")
    assert text.endswith(f"; accepted: {ACCEPTED}")
    assert "\n" not in text


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_is_never_executed(tmp_path: Path, legacy: bool) -> None:
    written = tmp_path / "written"
    content = {"student": state_of(1), "teacher": {}, "epoch": 1, "optimizer": WritesAFile(written)}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(content, protocol=2))
    refused(tmp_path / "evil.pt", f"found a pickle that calls {os.system.__module__}.system, which was not executed")
    refused(tmp_path / "evil.bin", "found a pickle that")
    assert not written.exists()
    pickle.loads(pickle.dumps(WritesAFile(written)))  # what the files would have done
    assert written.exists()


def test_only_four_globals_are_allowed(tmp_path: Path) -> None:
    """Others are not, also where a library of this process has allowed them for its own files."""
    before = torch.serialization.get_safe_globals()
    torch.save({"student": state_of(1), "epoch": np.float32(1)}, tmp_path / "float32.pt")
    try:
        torch.serialization.add_safe_globals([np.dtypes.Float32DType])
        said = "found a pickle that calls numpy.dtypes.Float32DType, which was not executed"
        refused(tmp_path / "float32.pt", said)
        assert np.dtypes.Float32DType in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_scalars_of_numpy_1(tmp_path: Path) -> None:
    """Numpy 1 wrote the scalars' function under another name."""
    save_cosmos(tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for member in new.infolist():
            data = new.read(member)
            if member.filename.endswith("data.pkl"):
                assert data.count(b"numpy._core.multiarray\nscalar") == 1
                data = data.replace(b"numpy._core.multiarray\nscalar", b"numpy.core.multiarray\nscalar")
            old.writestr(member.filename, data)
    assert read_public(tmp_path / "old.pt", "teacher").digest == read_public(tmp_path / "new.pt", "teacher").digest


def test_the_optimizer_is_never_read(tmp_path: Path) -> None:
    """Its GiB is a hole in the file; to read it would take memory, and a page fault for every 64 KiB at least."""
    path = tmp_path / "large.pt"
    small = SIZES.model_copy(update={"text": SIZES.text.model_copy(update={"vocab_size": 64})})
    with torch.serialization.skip_data():  # numbers become holes, but lie where they would
        torch.save({"epoch": 1, "student": state_of(1, small), "optimizer": torch.empty(GIB, dtype=torch.uint8)}, path)
    assert path.stat().st_size > GIB
    assert path.stat().st_blocks * 512 < GIB // 4
    before = resource.getrusage(resource.RUSAGE_SELF)
    read_public(path, "student")
    after = resource.getrusage(resource.RUSAGE_SELF)
    faults = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt
    assert faults < GIB // (64 << 10) // 2
    assert after.ru_maxrss - before.ru_maxrss < (GIB >> 10) // 2  # in KiB


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    state = state_of(1)
    return state | {name: change(state[name])}


def with_nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            lambda: changed(f"{BLOCK}.mlp.c_fc.bias", with_nan),
            f"1 of 256 numbers of {BLOCK}.mlp.c_fc.bias are not finit",
        ),
        (
            lambda: changed(f"{BLOCK}.ln_1.weight", lambda tensor: tensor[:3]),
            f"found {BLOCK}.ln_1.weight of shape [3], where its other tensors are those of a model with [64]",
        ),
        (
            lambda: changed("visual.positional_embedding", lambda tensor: tensor[:4]),
            "found 4 positions in the image tower, not those of a class token and a square",
        ),
        (lambda: changed("visual.conv1.weight", lambda tensor: tensor[:, :1]), "found patches of 1 channels"),
        (
            lambda: changed("text_projection", lambda tensor: tensor[0]),
            "found text_projection of shape [64], which has",
        ),
        (
            lambda: changed("text_projection", lambda tensor: tensor[:, :32]),
            "found a model that the config cannot say: text.width: 64 must equal model.embed_dim (32)",
        ),
        (lambda: changed("ln_final.bias", lambda tensor: tensor.int()), "found ln_final.bias in int32, not in plain"),
        (
            lambda: changed("ln_final.bias", lambda tensor: tensor.to_sparse()),
            "found ln_final.bias in float32, sparse_coo, not in plain floating-point numbers",
        ),
        (
            lambda: changed("ln_final.bias", lambda tensor: torch.nested.nested_tensor([tensor])),
            "found ln_final.bias in float32, nested, not in plain floating-point numbers",
        ),
        (lambda: changed("ln_final.bias", lambda tensor: tensor.to("meta")), "found ln_final.bias in float32, not"),
        (lambda: without("ln_final.bias"), "found a model without ln_final.bias"),
        (lambda: without("text_token_mapping.bias"), "found a model without text_token_mapping.bias"),
        (lambda: without("visual.class_embedding"), "found a model without visual.class_embedding"),
        (
            lambda: state_of(1) | {"more": torch.zeros(1), "most": torch.zeros(1)},
            "other parts than ours: more and 1 more",
        ),
        (lambda: state_of(1) | {"name": "tiny"}, "found a dict with 'name', which is no tensor, among its tensors"),
        (lambda: {"epoch": 3, "teacher": state_of(1)}, "found a COSMOS checkpoint without a student, with a teacher"),
        (lambda: {"epoch": 3, "optimizer": {}}, "found a dict of epoch, optimizer, without tensors"),
        (dict, "found an empty dict, without tensors"),
        (lambda: {"student": {}, "teacher": {}}, "found a dict of student, teacher, without tensors"),
        (
            lambda: {"student": state_of(1), "teacher": towers(state_of(2))},
            "found a student and a teacher of different models: they differ in distill_logit_scale",
        ),
        (lambda: prefixed("module.") | towers(state_of(1)), "found two tensors for positional_embedding, with a"),
        (lambda: prefixed("text.") | towers(state_of(1)), "found two tensors for positional_embedding, with a"),
        (
            lambda: {"state_dict": prefixed("student.") | prefixed("teacher.")},
            "found 2 models, behind student. and teacher. before names: save the tensors of one model alone, without",
        ),
        (
            lambda: prefixed("model._orig_mod.") | {"loss.scale": torch.zeros(1)},
            "found a model behind model._orig_mod. before its names, and loss.scale without it: save the tensors of",
        ),
        (lambda: [torch.zeros(1)], "found a list, not a dict of tensors"),
        (lambda: {"base_model.model.visual.lora_A.weight": torch.zeros(1)}, "found a LoRA, which changes a model"),
        (
            lambda: state_of(1) | {f"{BLOCK}.attn.lora_down.weight": torch.zeros(1)},
            "found a LoRA, which changes a model",
        ),
        (lambda: towers(state_of(1)) | {"logit_bias": torch.zeros(1)}, "found a SigLIP model (sigmoid loss)"),
        (lambda: {"vision_model.head.probe": torch.zeros(1)}, "found a SigLIP model (sigmoid loss)"),
        (lambda: {"visual.layer1.0.conv1.weight": torch.zeros(1)}, "found a CLIP model whose image tower is a ResNet"),
        (
            lambda: {"vision_model.pre_layrnorm.bias": torch.zeros(1)},
            "found a model of Hugging Face without its config",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_contents_that_are_no_model_of_ours(tmp_path: Path, content: Callable[[], Any], said: str) -> None:
    torch.save(content(), tmp_path / "bad.pt")
    refused(tmp_path / "bad.pt", said)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in towers(state_of(2)).items()}


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state_of(1).items() if key != name}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_files_that_are_cut_off(tmp_path: Path, share: float) -> None:
    torch.save(openclip_model().state_dict(), tmp_path / "cut.pt")
    save_file(openclip_model().state_dict(), tmp_path / "cut.safetensors")
    torch.save(openclip_model().state_dict(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for path in (tmp_path / "cut.pt", tmp_path / "cut.safetensors", tmp_path / "legacy.pt"):
        os.truncate(path, int(share * path.stat().st_size))
        refused(path, "cut off or damaged" if share else "found an empty file" if path.suffix == ".pt" else "found")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    for data, said in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "found a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>", "found a page of HTML"),
        (b"some text", "found neither a file of torch.save nor safetensors"),
    ):
        path.write_bytes(data)
        refused(path, said)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    refused(path, "found a TorchScript program, as OpenAI published its weights")
    path.write_bytes(pickle.dumps({"student": 1}, protocol=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(path, "found a pickle that is not of torch.save, or is cut off or damaged (Unsupported operand")
    np.savez(tmp_path / "arrays.npz", np.zeros(3))
    refused(tmp_path / "arrays.npz", "found a zip file that torch.save did not write")
    os.mkfifo(tmp_path / "fifo.pt")
    refused(tmp_path / "fifo.pt", "cannot be read: it is a FIFO, not a regular file")
    assert is_public(path)
    assert is_public(tmp_path / "none.pt")
    assert not is_public(tmp_path / "none")
    refused(tmp_path / "none.pt", "cannot be read: No such file or directory")
