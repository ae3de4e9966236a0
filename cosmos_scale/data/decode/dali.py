"""The DALI decoder: executes view plans of a whole batch, on a GPU where there is one.

Workers hand over encoded pictures with their plans. DALI decodes, crops and resizes. Colour follows on the same device
(crop_colour.py), because DALI's own colour operations do not use HSV and have no order. Nothing is drawn at random
here, so there is no state to save.
"""

from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from cosmos_scale.config import DaliConfig, ViewsConfig
from cosmos_scale.data.decode import Views
from cosmos_scale.data.decode.background import KEEP
from cosmos_scale.data.decode.crop_colour import colour_crops_
from cosmos_scale.data.decode.picture import decode_rgbx, picture_format
from cosmos_scale.data.samples.sample import DamagedSample
from cosmos_scale.data.samples.view_plan import ViewPlan
from cosmos_scale.errors import UserError

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

T = TypeVar("T")

PACKAGES = {"12": "nvidia-dali-cuda120", "13": "nvidia-dali-cuda130"}  # by the major version of CUDA
OLDEST, TOO_NEW = (2, 3), (3,)

# JPEG markers that every decoder of DALI takes: Huffman-coded frames, tables, applications' data, comments. libjpeg
# skips other markers; DALI's parser fails at them, and with it the whole batch.
PLAIN_MARKERS = {0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}
START_OF_SCAN, ADOBE = 0xDA, 0xEE
PLAIN_SAMPLING = ("444", "422", "440", "420", "411", "Gray")


def picture_for_dali(image_bytes: bytes, max_pixels: int, background: str = KEEP) -> tuple[bytes, int, int]:
    """Check a picture, and return (a file that DALI decodes bit for bit as decode_rgbx does, height, width).

    Plain JPEGs stay as they are. Any other picture is decoded here and becomes a PPM file: DALI reads palettes, alpha,
    16 bits, inks and rare markers in its own way or not at all. Raises DamagedSample, as decode_rgbx does: with one
    damaged picture in a batch the whole batch would fail.
    """
    shape = _plain_jpeg_shape(image_bytes)
    if shape is not None and shape[0] * shape[1] <= max_pixels:
        try:
            # Reads every coefficient, but computes only an eighth of the picture's height and width, in grey.
            simplejpeg.decode_jpeg(image_bytes, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1)
        except Exception as error:  # of any type, as in decode_rgbx: no broken byte may end the run
            raise DamagedSample(f"the picture does not decode: {error}") from error
        return image_bytes, *shape
    pixels = decode_rgbx(image_bytes, max_pixels, background)
    height, width = pixels.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + pixels[..., :3].tobytes(), height, width


def _plain_jpeg_shape(image_bytes: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that DALI reads as libjpeg does; None for any other file or a damaged header."""
    if picture_format(image_bytes) != "jpeg" or not _has_plain_markers(image_bytes):
        return None
    try:
        height, width, colourspace, sampling = simplejpeg.decode_jpeg_header(image_bytes)
    except Exception:  # of any type: decode_rgbx will say what is wrong
        return None
    is_plain = colourspace in ("YCbCr", "Gray") and sampling in PLAIN_SAMPLING
    return (height, width) if is_plain else None


def _has_plain_markers(jpeg: bytes) -> bool:
    """Walk a JPEG's segments up to its first scan."""
    position, end = 2, len(jpeg) - 4
    while position < end and jpeg[position] == 0xFF:
        marker = jpeg[position + 1]
        length = int.from_bytes(jpeg[position + 2 : position + 4], "big")
        if marker == START_OF_SCAN:
            return True
        # Slices: the file may end in the middle.
        is_adobe = marker == ADOBE and jpeg[position + 4 : position + 9] == b"Adobe"
        is_other_colour = is_adobe and jpeg[position + 15 : position + 16] != b"\x01"
        if marker not in PLAIN_MARKERS or length < 2 or is_other_colour:
            return False
        position += 2 + length
    return False


class Encoded(NamedTuple):
    """A batch of checked pictures with their plans; tensors only, so that workers share the batch without pickling.

    image_bytes: [N] uint8, all pictures one after another. offsets: [B + 1] int64, the beginning of each picture and
    the end of the last. The other fields are those of B ViewPlans with leading shape [V, B], global crops first.
    """

    image_bytes: Tensor
    offsets: Tensor
    boxes: Tensor
    flip: Tensor
    jitter_order: Tensor
    jitter_factors: Tensor
    grey: Tensor
    blur_radius: Tensor
    solarise: Tensor

    def colour(self, views: slice) -> list[Tensor]:
        """Arguments of `colour_crops_` for some views' crops, [N, ...] each: view by view, then sample by sample."""
        fields = (self.jitter_order, self.jitter_factors, self.grey, self.blur_radius, self.solarise)
        return [field[views].flatten(0, 1) for field in fields]


def stack(pictures: Sequence[bytes], plans: Sequence[ViewPlan]) -> Encoded:
    """Put checked pictures and their plans, of equal views, into one batch."""
    image_bytes = np.frombuffer(bytearray(b"".join(pictures)), dtype=np.uint8)
    offsets = np.cumsum([0, *(len(picture) for picture in pictures)])
    fields = {
        name: torch.from_numpy(np.stack([getattr(plan, name) for plan in plans], axis=1))
        for name in Encoded._fields[2:]
    }
    return Encoded(torch.from_numpy(image_bytes), torch.from_numpy(offsets), **fields)


class DaliDecoder:
    """Turns batches of encoded pictures into their views.

    image_size: side of the global crops. batch: most pictures in a batch. triton: whether Triton kernels may serve.
    Raises UserError where DALI is missing.
    """

    def __init__(
        self,
        views: ViewsConfig,
        image_size: int,
        batch: int,
        device: torch.device,
        options: DaliConfig,
        *,
        triton: bool = True,
    ) -> None:
        require_dali()
        self._triton = triton
        self._read: list[tuple[torch.cuda.Event, list[Tensor]]] = []  # outputs of DALI that a GPU may still read
        self._views = views
        self._image_size = image_size
        self._device = device
        self._prefetch = options.prefetch
        self._submitted = 0
        device_id = None
        if device.type == "cuda":
            device_id = torch.cuda.current_device() if device.index is None else device.index
        self._pipeline = define_pipeline(views, image_size, batch, device.type, device_id, options)
        self._pipeline.build()

    def stream(self, batches: Iterator[tuple[Encoded, T]]) -> Generator[tuple[Views, T], None, None]:
        """Yield the views of batch after batch, each with what came with it, while DALI works on the next ones.

        Views: [V, B, 3, H, W] uint8 on the device. The host waits for no GPU: on a GPU the views are
        valid on the stream that was current when they were asked for. data.dali.prefetch batches are asked for ahead.
        One stream at a time. Raises UserError where DALI fails, as where a GPU has no memory left.
        """
        waiting: list[tuple[Encoded, T]] = []
        try:
            for encoded, companion in batches:
                self._submit(encoded)
                waiting.append((encoded, companion))
                if len(waiting) > self._prefetch:
                    yield self._take(waiting[0][0]), waiting.pop(0)[1]
            while waiting:
                yield self._take(waiting[0][0]), waiting.pop(0)[1]
        finally:
            # If the caller stopped early, the next stream must not yield the batches that DALI still holds.
            for _ in range(self._submitted):
                self._outputs()

    def _submit(self, encoded: Encoded) -> None:
        pixels, offsets = encoded.image_bytes.numpy(), encoded.offsets.tolist()
        pictures = [pixels[start:end] for start, end in pairwise(offsets)]
        sides_V = np.array(
            [self._image_size] * self._views.global_crops + [self._views.local_size] * self._views.local_crops
        )
        sides_BV2 = np.repeat(np.stack([sides_V, sides_V], axis=-1)[None], len(pictures), axis=0)
        sides_BV2[..., 1] *= np.where(encoded.flip.numpy().T, -1, 1)
        self._pipeline.feed_input("pictures", pictures)
        self._pipeline.feed_input("boxes", np.ascontiguousarray(encoded.boxes.numpy().swapaxes(0, 1), dtype=np.int32))
        self._pipeline.feed_input("sides", sides_BV2.astype(np.float32))
        self._pipeline.schedule_run()
        self._submitted += 1

    def _outputs(self) -> list[Tensor]:
        """DALI's views of the oldest batch submitted: V tensors [B, side, side, 3] uint8. Raises UserError."""
        self._submitted -= 1
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            outputs = self._pipeline.share_outputs(stream)
        except RuntimeError as error:
            self._submitted = 0  # DALI gives up the pipeline, and all batches in it
            reason = str(error).rpartition("encountered:")[2].strip().partition("\n")[0]
            raise UserError(f"data.decoder: dali failed on a batch: {reason}") from error
        crops = [from_dlpack(output.as_tensor()) for output in outputs]
        self._pipeline.release_outputs()  # each tensor keeps its own memory
        return crops

    def _take(self, encoded: Encoded) -> Views:
        crops = self._outputs()
        V_global = self._views.global_crops
        batch = encoded.boxes.shape[1]
        kinds = ((self._image_size, slice(V_global)), (self._views.local_size, slice(V_global, len(crops))))
        made = []
        for side, kind in kinds:
            views = torch.empty(len(crops[kind]), batch, 3, side, side, dtype=torch.uint8, device=self._device)
            colour_crops_(views, crops[kind], *encoded.colour(kind), triton=self._triton)
            made.append(views)
        if self._device.type == "cuda":
            self._keep(crops)
        return Views(*made)

    def _keep(self, crops: list[Tensor]) -> None:
        """Keep DALI's memory until the GPU has read it: DALI may not know the stream that reads."""
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        self._read = [(event, kept) for event, kept in self._read if not event.query()]
        self._read.append((done, crops))


def define_pipeline(
    views: ViewsConfig, image_size: int, batch: int, device: str, device_id: int | None, options: DaliConfig
) -> "Pipeline":
    """Decode each picture once, cut out every view's box, resize it: one output a view, [side, side, 3] uint8.

    device: cpu, or cuda for decoding by hardware and CUDA. Inputs: "pictures" (encoded), "boxes" [V, 4] int32, "sides"
    [V, 2] float32, the second negative where the view is mirrored.
    """
    from nvidia.dali import Pipeline, fn, types

    on_gpu = device == "cuda"
    # Queues of one batch: further batches wait in the inputs' own queues, so that the first batch can run alone.
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=options.threads,
        device_id=device_id,
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )
    gpu_options: dict[str, Any] = {}
    if on_gpu:
        gpu_options = {
            "hw_decoder_load": options.hw_decoder_load,
            "preallocate_width_hint": options.preallocate_width,
            "preallocate_height_hint": options.preallocate_height,
        }
    with pipeline:
        pictures = fn.external_source(name="pictures", dtype=types.UINT8, ndim=1)
        boxes = fn.external_source(name="boxes", dtype=types.INT32, ndim=2)
        sides = fn.external_source(name="sides", dtype=types.FLOAT, ndim=2)
        decoded = fn.decoders.image(
            pictures,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # Pillow ignores EXIF's orientation too
            jpeg_fancy_upsampling=True,  # as libjpeg does; without it CUDA's decoder takes a shortcut
            **gpu_options,
        )
        crops = []
        for view in range(views.global_crops + views.local_crops):
            # Cut, then resize: a resize of a region reads beyond the region's border; the published pipeline does not.
            box = fn.slice(decoded, start=boxes[view, 0:2], shape=boxes[view, 2:4], axes=[0, 1])
            crops.append(fn.resize(box, size=sides[view], interp_type=types.INTERP_CUBIC, antialias=True))
        pipeline.set_outputs(*crops)
    return pipeline


def require_dali() -> None:
    """Raise UserError, with the line that installs it for this torch's CUDA, where DALI 2 is missing."""
    needed = "data.decoder: dali needs NVIDIA DALI"
    try:
        import nvidia.dali as dali
    except ImportError as error:
        raise UserError(f"{needed} ({error}): {_remedy()}") from error
    version = tuple(int(part) for part in dali.__version__.split(".")[:2])
    if not OLDEST <= version < TOO_NEW:
        raise UserError(f"{needed} {_dotted(OLDEST)} to 2.x, not {dali.__version__}: {_remedy()}")


def _remedy() -> str:
    cuda = torch.version.cuda
    # Without CUDA any of the packages runs: pictures are decoded on the CPU.
    major = "13" if cuda is None else cuda.split(".")[0]
    if major not in PACKAGES:
        return f"there is none for this torch's CUDA {cuda}; install a torch for CUDA 12 or 13, or take decoder: torch"
    return f'pip install "{PACKAGES[major]}>={_dotted(OLDEST)},<{_dotted(TOO_NEW)}", or take decoder: torch'


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
