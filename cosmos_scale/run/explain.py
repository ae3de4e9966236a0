"""The dry run, which prints what a run will do: `cosmos-scale train --dry-run --world-size N RUN.yaml`."""

from collections.abc import Iterator

import torch

from cosmos_scale.config import RunConfig
from cosmos_scale.config.section import redact_urls
from cosmos_scale.data.shards.index import open_sources
from cosmos_scale.data.training.order import steps_per_epoch
from cosmos_scale.engine.memory import gradients_in_flight, state_memory, total_bytes
from cosmos_scale.engine.schedule import ema_momentum, learning_rate
from cosmos_scale.errors import UserError
from cosmos_scale.model.cosmos import CosmosModel, parameter_decays
from cosmos_scale.words import counted, print_row

MIB, GIB = 2**20, 2**30


def explain(config: RunConfig, world_size: int) -> None:
    """Print the resolved run at a world size: batch, steps, parameters, views, files, and the schedules at a few steps.

    Samples per epoch come from the shards' index, as in training, or from data.samples where the shards are absent.
    Raises UserError: a world size that does not divide the batch, no sample, a warm-up longer than the run.
    """
    per_rank, micro_batches = config.samples_per_rank(world_size), config.train.micro_batches
    samples, origin = _samples(config)
    epoch_steps = steps_per_epoch(samples, config)
    steps, last = config.total_steps(epoch_steps), config.last_step(epoch_steps)
    longer = config.describe_longer(epoch_steps)
    print(f"run {config.name}")
    rows = [
        ("ranks", f"{world_size:,}; ZeRO stage {config.zero.stage}, {config.precision}, device {config.device}"),
        ("global batch", f"{config.train.global_batch:,} = {counted(world_size, 'rank')} x {per_rank:,}"),
        ("micro-batches", f"{micro_batches:,} of {counted(per_rank // micro_batches, 'sample')} a rank"),
        ("recomputed blocks", _recomputed(config.train.recompute)),
        ("memory per rank", _memory(config, world_size)),
        ("samples per epoch", f"{samples:,} ({origin})"),
        ("steps per epoch", f"{epoch_steps:,}"),
        ("steps of the schedules", f"{steps:,}"),
        ("last step", f"{last:,}" + (" (train.max_steps)" if last < steps else longer and f"; {longer}")),
        *_model_rows(config),
        *_data_rows(config),
        *_output_rows(config),
    ]
    for name, value in rows:
        print_row(f"  {name:<24}", value)
    print(f"schedules: momentum {config.ema.schedule}, teacher moves {config.ema.order}")
    print(f"  {'step':>10}{'learning rate':>16}{'teacher momentum':>19}")
    for step in _telling_steps(config.optimizer.warmup_steps, steps):
        lr, momentum = learning_rate(step, config.optimizer, steps), ema_momentum(step, config.ema, steps)
        print(f"  {step:>10,}{lr:>16.4e}{momentum:>19.6f}")


def _recomputed(every: int) -> str:
    return {0: "none: all activations are kept", 1: "all"}.get(every, f"one in {every}, the first among them")


def _memory(config: RunConfig, world_size: int) -> str:
    """How much memory student, optimizer and teacher take by the formulas of engine/memory.py, part by part."""
    with torch.device("meta"):
        model = CosmosModel(config.model)
    rows, in_flight = state_memory(model, config, world_size), gradients_in_flight(model, config, world_size)
    parts: dict[str, int] = {}
    for row in rows:
        parts[row.part] = parts.get(row.part, 0) + row.nbytes
    shown = ", ".join(f"{part} {_size(nbytes)}" for part, nbytes in parts.items() if nbytes >= MIB / 10)
    host = f" and {_size(total_bytes(rows, on_host=True))} on the host" if config.zero.offload else ""
    more = f", up to {_size(in_flight)} of gradients in the backward" if in_flight else ""
    return f"{_size(total_bytes(rows, on_host=False))}{host} by formula ({shown}){more}, and activations on top"


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:,.1f} MiB"


def count_parameters(config: RunConfig) -> dict[bool, tuple[int, int]]:
    """Return (tensors, parameters) with weight decay (key True) and without (False); no memory is allocated."""
    with torch.device("meta"):
        model = CosmosModel(config.model)
    counts = {True: (0, 0), False: (0, 0)}
    for name, parameter in model.named_parameters():
        decays = parameter_decays(name, parameter)
        tensors, elements = counts[decays]
        counts[decays] = (tensors + 1, elements + parameter.numel())
    return counts


def _samples(config: RunConfig) -> tuple[int, str]:
    try:
        return open_sources(config.data.sources, config.data.remote).epoch_samples, "index"
    except UserError as error:
        if config.data.samples is None:
            raise
        return config.data.samples, f"data.samples; {error}"


def _model_rows(config: RunConfig) -> Iterator[tuple[str, str]]:
    counts = count_parameters(config)
    tensors, elements = (sum(pair) for pair in zip(*counts.values(), strict=True))
    yield "parameters", f"{elements:,} in {tensors} tensors, and as many in the teacher"
    yield (
        "weight decay",
        f"{config.optimizer.weight_decay:g} on {_tensors(counts[True])}; none on {_tensors(counts[False])}",
    )
    vision, text = config.model.vision, config.model.text
    yield (
        "image tower",
        f"ViT/{vision.patch_size}, {counted(vision.layers, 'layer')}, width {vision.width}, {vision.image_size} px",
    )
    yield (
        "text tower",
        f"{counted(text.layers, 'layer')}, width {text.width}, {counted(text.context_length, 'position')}",
    )
    yield "attention", config.model.attention + (", blocks compiled" if config.model.compile else "")


def _data_rows(config: RunConfig) -> Iterator[tuple[str, str]]:
    for source in config.data.sources:
        yield (
            f"source {source.name}",
            redact_urls(source.shards) + (f", weight {source.weight:g}" if source.weight != 1 else ""),
        )
    views, captions = config.data.views, config.data.captions
    image_size = config.model.vision.image_size
    yield "crops", f"{views.global_crops} x {image_size} px and {views.local_crops} x {views.local_size} px"
    yield "decoder", config.data.decoder
    local = captions.count - captions.global_count
    yield "captions", f"{captions.global_count} global and {local} local, {captions.sampling}"


def _output_rows(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield "writes to", str(config.output / config.name)
    every = f"every {counted(config.checkpoint.every, 'step')} and " if config.checkpoint.every else ""
    kept = config.checkpoint.keep_every
    for_good = "" if kept is None else f", and all at multiples of {kept:,} steps"
    yield "checkpoints", f"{every}at the end; the last {config.checkpoint.keep_last} are kept{for_good}"
    heads = " with new heads" if config.init_heads == "new" else ""
    start = f"weights of {config.init_from}{heads}" if config.init_from else "freshly drawn weights"
    yield "starts from", start if config.resume == "never" else f"resume: {config.resume}, else {start}"
    for evaluator in config.eval:
        if evaluator.every:
            name = "" if evaluator.name == evaluator.kind else f"{evaluator.name}: "
            yield "evaluates", f"{name}{evaluator.describe()} every {counted(evaluator.every, 'step')}"
    yield "seed", str(config.seed)


def _telling_steps(warmup: int, total: int) -> list[int]:
    """The steps that show the schedules: the first, the end of the warm-up, the quarters, the last."""
    return sorted({0, max(warmup - 1, 0), warmup, total // 4, total // 2, 3 * total // 4, total - 1})


def _tensors(count: tuple[int, int]) -> str:
    tensors, elements = count
    return f"{counted(tensors, 'tensor')} ({elements:,})"
