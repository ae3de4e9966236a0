"""The teacher's image tower replayed as a CUDA graph, against the same launches one by one."""

import time

import torch

from cosmos_scale.config.load import load_config
from cosmos_scale.config.shipped import shipped_file
from cosmos_scale.engine.teacher_graph import WARM_UP, GraphedEncoder
from cosmos_scale.model.cosmos import CosmosModel
from tools.gpu_stages.recorder import Recorder, relative_error


def measure(recorder: Recorder) -> None:
    """Write times and the difference of the results; needs a GPU."""
    if not recorder.on_gpu:
        recorder.write(skipped="a CUDA graph needs a GPU")
        return
    config = load_config(shipped_file("cc3m_vitb16"), ["train.schedule_steps=100000"])
    model = CosmosModel(config.model)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to(recorder.device, recorder.dtype).requires_grad_(requires_grad=False)
    images = torch.randint(0, 256, (128, 3, 224, 224), dtype=torch.uint8, device=recorder.device)
    with torch.no_grad():
        encoder = GraphedEncoder(model.encode_image)
        for _ in range(WARM_UP):
            expected = encoder(images)
        recorder.wait()
        began = time.perf_counter()
        model.encode_image(images)
        host = time.perf_counter() - began
        replayed = encoder(images)
        recorder.wait()
        recorder.write(
            what="teacher's image tower, 128 crops",
            difference=relative_error(replayed, expected.float()),
            ok=torch.equal(replayed, expected) and encoder.replays,
            one_by_one_ms=recorder.milliseconds(lambda: model.encode_image(images)),
            host_ms=1e3 * host,
            graph_ms=recorder.milliseconds(lambda: encoder(images)),
        )
