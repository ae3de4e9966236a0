"""What a step would take on GPUs that are not here: a roofline of the counts that benchmarks/device_counts.py takes.

Nothing here was measured on a GPU. Operations, bytes and launches of a step are counted from the code, and so are the
collectives (cosmos_scale/testing/traffic.py). They are divided by a GPU's rates. Two sets of assumptions, `hopeful` and
`cautious`, say which share of a rate is reached; each figure is a range between both.

- a part's time is the longer of its operations at the rate of products and its bytes at the rate of memory
- the host launches one operator after the other; where it takes longer than the device, a step takes the host's time
- a collective crosses the links inside a node and the network between nodes, in three stages: inside, across, inside
- the loss grows with the number of GPUs, since every rank compares its samples with all samples of the batch
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/paper_model.py`

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.device_counts import NARROW, RUNS, STEP_PHASES, block_counts, case_config, count
from benchmarks.report import LOG_WIDTH, Figure, argument_parser, report
from cosmos_scale.cli.leave import leave_after
from cosmos_scale.config import RunConfig
from cosmos_scale.model.cosmos import CosmosModel
from cosmos_scale.profiling.collectives import Collective
from cosmos_scale.profiling.flops import Tokens, loss_flops, step_flops, student_tokens, teacher_tokens, visible_pairs
from cosmos_scale.profiling.operators import META, Count, total
from cosmos_scale.profiling.planned_batch import planned_batch, planned_lengths
from cosmos_scale.profiling.rates import CAUTIOUS, HOPEFUL, Assumed
from cosmos_scale.testing.device_counts import count_step, count_update
from cosmos_scale.testing.ranks import run_ranks
from cosmos_scale.testing.traffic import count_losses, count_traffic

NODE = 8  # GPUs
# The host's milliseconds for a step of so many operators: benchmarks/host_time.py, stage 1, on 2 cores of an AMD EPYC.
HOST_MS, HOST_OPERATORS = 37.0, 1749
NARROWED = "vitb16"  # by NARROW all of RUNS are the same model
GPUS = (8, 64, 256, 1024)
COUNTED_RANKS = 8  # of the fake group whose collectives are counted
PARTS = ("products", "attention", "norms, pointwise, copies", "loss", "gradients, update", "traffic")


class Chip(NamedTuple):
    """A GPU's rates.

    peak, products: TFLOP/s of dense bf16 products, by the data sheet, and the most that anybody measured. memory: TB/s.
    link: GB/s of a GPU in one direction inside a node. network: GB/s of a GPU in one direction between nodes.
    """

    name: str
    peak: float
    products: float
    memory: float
    link: float
    network: float


# NVIDIA's data sheets of the SXM modules; measured products: the maximum achievable rates in Stas Bekman's "Machine
# Learning Engineering". The network is an assumption: an adapter of 200 Gbit/s (A100) or 400 Gbit/s for each GPU.
CHIPS = (
    Chip("A100", 312, 271, 2.04, 300, 25),
    Chip("H100", 989, 795, 3.35, 450, 50),
    Chip("H200", 989, 795, 4.8, 450, 50),
    Chip("B200", 2250, 1745, 8.0, 900, 50),
)


class StepWork(NamedTuple):
    """What a step of one rank asks for.

    phases: by phase and group, of one rank alone, without the loss. losses: the loss's collectives and its counts by
    group, for each number of GPUs. attention: operations. needed_loss, needed: operations that the loss needs on one
    rank alone, and the rest of the step. collectives: all but the loss's, of COUNTED_RANKS ranks, scaled to this model.
    samples: of a rank. phases_alone: as phases, with the loss of a rank alone.
    """

    phases: Mapping[str, Mapping[str, Count]]
    losses: Mapping[int, tuple[Sequence[Collective], Mapping[str, Count]]]
    attention: int
    needed_loss: int
    needed: int
    collectives: Sequence[Collective]
    samples: int
    phases_alone: Mapping[str, Mapping[str, Count]]


class PaperStep(NamedTuple):
    """The paper's step. parts: ms of the device by PARTS. host: ms. mfu: needed operations over the peak."""

    parts: dict[str, float]
    host: float
    samples_per_second: float
    mfu: float

    @property
    def ms(self) -> float:
        """The longer of the device's time and the host's."""
        return max(self.host, sum(self.parts.values()))


def paper_step(work: StepWork, chip: Chip, gpus: int, assumed: Assumed) -> PaperStep:
    """Return what a step takes on so many GPUs."""

    def ms(flops: float, nbytes: float, share: float) -> float:
        by_products = flops / (chip.products * 1e12 * share)
        return 1e3 * max(by_products, nbytes / (chip.memory * 1e12 * assumed.memory))

    towers = [work.phases[phase] for phase in STEP_PHASES if phase in work.phases]
    by_group = {group: total(groups[group] for groups in towers) for group in towers[0]}
    products, attention = by_group["products"], by_group["attention"]
    other = by_group["norms and pointwise"].nbytes + by_group["copies"].nbytes
    # Each rank updates its share of the weights; gradients and both copies of the weights are whole.
    engine = sum(
        count.nbytes / (gpus if phase == "update" else 1)
        for phase in ("gradients", "update", "refresh")
        for count in work.phases[phase].values()
    )
    loss_collectives, loss_groups = work.losses[gpus]
    loss = total(loss_groups.values())
    parts = dict(
        zip(
            PARTS,
            (
                ms(products.flops, products.nbytes, assumed.products),
                ms(work.attention, attention.nbytes, assumed.attention),
                ms(0, other, 1.0),
                ms(loss.flops, loss.nbytes, assumed.attention),
                ms(0, engine, 1.0),
                sum(
                    1e3 * _seconds(collective, chip, gpus, assumed)
                    for collective in [*work.collectives, *loss_collectives]
                ),
            ),
            strict=True,
        )
    )
    launches = loss.launches + sum(count.launches for groups in work.phases.values() for count in groups.values())
    host = launches * assumed.launch_us / 1e3
    step = PaperStep(parts, host, 0.0, 0.0)
    rate = work.samples / step.ms * 1e3
    needed = work.needed + work.needed_loss * gpus
    return step._replace(samples_per_second=rate, mfu=needed / (step.ms / 1e3) / (chip.peak * 1e12))


def _seconds(collective: Collective, chip: Chip, gpus: int, assumed: Assumed) -> float:
    """Return the seconds for which a collective holds up so many GPUs."""
    ways = 2 if collective.kind == "all_reduce" else 1
    inside, nodes = min(NODE, gpus), max(1, gpus // NODE)
    nbytes = collective.nbytes * ways
    links = nbytes * (inside - 1) / inside / (chip.link * 1e9)
    network = nbytes / inside * (nodes - 1) / nodes / (chip.network * 1e9)
    seconds = (links + network) / assumed.traffic + assumed.collective_us / 1e6
    return seconds * (assumed.exposed if collective.phase == "backward" else 1.0)


def attention_flops(config: RunConfig, lengths_KB: torch.Tensor) -> int:
    """Return the operations of attention's products: 2 forward, 5 backward, each 2 L^2 D, half of it where causal."""
    batch, model = planned_batch(config, lengths_KB, META), config.model

    def forward(tokens: Tokens, width: int, layers: int, *, causal: bool) -> int:
        return 4 * width * layers * int(visible_pairs(tokens.lengths, causal=causal).sum())

    flops = 0
    for (crops, captions), passes in ((student_tokens(batch, config), 3.5), (teacher_tokens(batch, config), 1.0)):
        both = forward(crops, model.vision.width, model.vision.layers, causal=False)
        both += forward(captions, model.text.width, model.text.layers, causal=True)
        flops += round(passes * both)
    return flops


def count_work(run: str, samples: int) -> StepWork:
    """Count a shipped run's step."""
    config = case_config(run, samples)
    engine, narrow = _engine_counts()
    seen, counted = _traffic()
    (losses,) = run_ranks(count_losses, 1, config, GPUS, timeout=300.0)
    with META:
        elements = sum(parameter.numel() for parameter in CosmosModel(config.model).parameters())
    batch = planned_batch(config, planned_lengths(config, samples), META)
    loss = loss_flops(batch, config)
    phases = count(run, samples, engine, narrow)
    return StepWork(
        phases={phase: groups for phase, groups in phases.items() if phase != "loss"},
        losses=dict(zip(GPUS, losses, strict=True)),
        attention=attention_flops(config, planned_lengths(config, samples)),
        needed_loss=loss,
        needed=step_flops(batch, config) - loss,
        # What travels beside the loss is weights and gradients.
        collectives=[
            found._replace(elements=round(found.elements * elements / counted))
            for found in seen
            if found.phase != "loss"
        ],
        samples=samples,
        phases_alone=phases,
    )


@lru_cache
def _engine_counts() -> tuple[dict[str, dict[str, Count]], int]:
    ((engine, narrow),) = run_ranks(count_update, 1, case_config(NARROWED, 1, *NARROW), timeout=300.0)
    return engine, narrow


@lru_cache
def _traffic() -> tuple[list[Collective], int]:
    config = case_config(NARROWED, COUNTED_RANKS, *NARROW, f"train.global_batch={COUNTED_RANKS}")
    ((seen, counted),) = run_ranks(count_traffic, 1, config, COUNTED_RANKS, timeout=300.0)
    return seen, counted


def parts_table(run: str, work: StepWork) -> Table:
    """Return a table: a row a part, a column a chip, on one node."""
    table = Table("ms on one node", *(chip.name for chip in CHIPS), title_justify="left")
    table.title = f"{run}, {work.samples} samples a GPU, bf16, ZeRO stage 1: hopeful .. cautious"
    steps = [[paper_step(work, chip, NODE, assumed) for assumed in (HOPEFUL, CAUTIOUS)] for chip in CHIPS]
    for part in PARTS:
        table.add_row(part, *(_range([step.parts[part] for step in both], ".1f") for both in steps))
    table.add_section()
    table.add_row("device", *(_range([sum(step.parts.values()) for step in both], ".0f") for both in steps))
    table.add_row("host", *(_range([step.host for step in both], ".0f") for both in steps))
    table.add_row("step", *(_range([step.ms for step in both], ".0f") for both in steps))
    return table


def scaling_table(run: str, work: StepWork) -> Table:
    """Return a table: a row a chip and number of GPUs."""
    table = Table(
        "GPUs", "step ms", "samples/s a GPU", "MFU %", "traffic ms", "loss ms", "longest", title_justify="left"
    )
    table.title = f"{run}, {work.samples} samples a GPU: hopeful .. cautious"
    for chip in CHIPS:
        for gpus in GPUS:
            low, high = (paper_step(work, chip, gpus, assumed) for assumed in (HOPEFUL, CAUTIOUS))
            longest = max([*PARTS, "host"], key=lambda part: high.host if part == "host" else high.parts[part])
            table.add_row(
                f"{gpus:,} x {chip.name}",
                _range([low.ms, high.ms], ".0f"),
                _range([low.samples_per_second, high.samples_per_second], ",.0f"),
                _range([100 * low.mfu, 100 * high.mfu], ".0f"),
                _range([low.parts["traffic"], high.parts["traffic"]], ".1f"),
                _range([low.parts["loss"], high.parts["loss"]], ".1f"),
                longest,
            )
        table.add_section()
    return table


def figures(run: str, work: StepWork) -> list[Figure]:
    """Return both ends of each chip's share of the peak on one node."""
    found = []
    for chip in CHIPS:
        for name, assumed in (("hopeful", HOPEFUL), ("cautious", CAUTIOUS)):
            step = paper_step(work, chip, NODE, assumed)
            note = f"by calculation, {NODE} x {chip.name}, {work.samples} samples a GPU: {step.ms:.1f} ms a step"
            found.append(Figure(f"paper_mfu_{run}_{work.samples}_{chip.name}_{name}", step.mfu, "of the peak", note))
    return found


def fp8_figures(run: str, work: StepWork) -> list[Figure]:
    """Return what FP8 in the image tower's blocks would change on an H100, and the share of the products it is in.

    FP8's products take half the time. The student's backward is half products for the input gradients. Rounding reads
    the inputs of a block's four products in bf16 and writes them in FP8: 3 bytes for each of 7 widths of a token.
    """
    samples = work.samples
    config, chip = case_config(run, samples), CHIPS[1]
    vision, crops = config.model.vision, samples * config.data.views.global_crops
    tokens = crops * (1 + (vision.image_size // vision.patch_size) ** 2)
    rounded = 3 * 7 * vision.width * vision.layers * tokens
    whole = count_step(config, planned_lengths(config, samples)).by_group()["products"].flops
    blocks = block_counts(run, samples)["image"]
    student = blocks["student"].flops + blocks["backward"].flops // 2
    note = f"by calculation, {chip.name}, {samples} samples a GPU"
    found = []
    for part, flops in (("teacher", blocks["teacher"].flops), ("student", student)):
        found.append(Figure(f"fp8_share_{part}_{run}_{samples}", flops / whole, "of the products", note))
        for name, assumed in (("hopeful", HOPEFUL), ("cautious", CAUTIOUS)):
            saved = 1e3 * flops / (chip.products * 1e12 * assumed.products) / 2
            found.append(Figure(f"fp8_saved_{part}_{run}_{samples}_{name}", saved, "ms", note))
    for name, assumed in (("hopeful", HOPEFUL), ("cautious", CAUTIOUS)):
        spent = 1e3 * rounded / (chip.memory * 1e12 * assumed.memory)
        more = f"{note}; {rounded / 1e9:.1f} GB"
        found.append(Figure(f"fp8_rounding_teacher_{run}_{samples}_{name}", spent, "ms", more))
        left = 1e3 * blocks["teacher"].flops / (chip.products * 1e12 * assumed.products) / 2 - spent
        found.append(Figure(f"fp8_left_teacher_{run}_{samples}_{name}", left, "ms", f"{note}; saved less rounding"))
        step = paper_step(work, chip, NODE, assumed).ms
        found.append(Figure(f"fp8_left_share_teacher_{run}_{samples}_{name}", left / step, "of the step", note))
    return found


def share_figures(run: str, work: StepWork) -> list[Figure]:
    """Return the shares that products, and norms with pointwise operators and copies, have of a step on an H100."""
    found = []
    for name, assumed in (("hopeful", HOPEFUL), ("cautious", CAUTIOUS)):
        step = paper_step(work, CHIPS[1], NODE, assumed)
        for part, key in ((PARTS[0], "products"), (PARTS[2], "pointwise")):
            note = f"{part}; by calculation, {NODE} x {CHIPS[1].name}, {work.samples} samples a GPU"
            share = step.parts[part] / sum(step.parts.values())
            found.append(Figure(f"paper_share_{key}_{run}_{work.samples}_{name}", share, "of the device's time", note))
    return found


def host_figures(run: str, work: StepWork) -> list[Figure]:
    """Return the host's time at the rate that one host was measured at, and what graphs of the image blocks would save.

    A graph of a block replays its forward, another its backward: two launches in place of all.
    """
    each = HOST_MS / HOST_OPERATORS
    launches = sum(total(groups.values()).launches for groups in work.phases_alone.values())
    blocks = block_counts(run, work.samples)["image"]
    gone = blocks["student"].launches + blocks["backward"].launches
    replays = 2 * case_config(run, work.samples).model.vision.layers
    name, note = f"{run}_{work.samples}", f"at {HOST_MS:.0f} ms for {HOST_OPERATORS:,} operators, as measured"
    return [
        Figure(f"host_us_operator_{name}", 1e3 * each, "us", note),
        Figure(f"host_ms_{name}", launches * each, "ms", f"{launches:,} launches of a rank alone, {note}"),
        Figure(f"host_graph_replays_{name}", replays, "launches", f"of graphs of blocks, in place of {gone}"),
        Figure(f"host_graph_launches_{name}", gone, "launches", "of the student's image blocks, forward and backward"),
        Figure(f"host_graph_ms_{name}", (gone - replays) * each, "ms", f"that such graphs would save at most, {note}"),
    ]


def _range(ends: Iterable[float], form: str) -> str:
    return " .. ".join(f"{end:{form}}" for end in ends)


def draw(run: str, work: StepWork, picture: Path) -> None:
    """Draw the parts of the step by chip, and samples a second by number of GPUs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    names = [chip.name for chip in CHIPS]
    for offset, (title, assumed) in zip((-0.2, 0.2), (("hopeful", HOPEFUL), ("cautious", CAUTIOUS)), strict=True):
        steps = [paper_step(work, chip, NODE, assumed) for chip in CHIPS]
        places = [number + offset for number in range(len(CHIPS))]
        below = [0.0] * len(CHIPS)
        for number, part in enumerate(PARTS):
            times = [step.parts[part] for step in steps]
            label = part if title == "hopeful" else None
            left.bar(places, times, 0.38, bottom=below, color=f"C{number}", label=label)
            below = [start + spent for start, spent in zip(below, times, strict=True)]
        left.scatter(places, [step.host for step in steps], marker="_", s=500, color="black", label=None, zorder=3)
    left.set_xticks(range(len(CHIPS)), [f"{name}\nhopeful | cautious" for name in names], fontsize=8)
    left.set(title=f"A step on one node, {work.samples} samples a GPU (lines: host)", ylabel="ms, by calculation")
    left.legend(frameon=False, fontsize=8)
    for number, chip in enumerate(CHIPS):
        bounds = [[paper_step(work, chip, gpus, of).samples_per_second for gpus in GPUS] for of in (CAUTIOUS, HOPEFUL)]
        right.fill_between(GPUS, *bounds, alpha=0.25, color=f"C{number}", label=chip.name)
    right.set(title="Samples a second and GPU", xscale="log", xlabel="GPUs", ylim=(0, None))
    right.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
    right.minorticks_off()
    right.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{run}: by calculation, not measured")
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    examples = ("", "--run vitb16 --samples 64 --png paper.png")
    parser = argument_parser("paper_model", (__doc__ or "").partition("\n")[0], examples)
    parser.add_argument("--run", choices=RUNS, nargs="+", default=["vitb16"], help="default: vitb16")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="of a GPU; default: 64")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the last run of --run")
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    found: list[Figure] = []
    for run in arguments.run:
        work = count_work(run, arguments.samples)
        console.print(parts_table(run, work))
        console.print(scaling_table(run, work))
        found += figures(run, work) + share_figures(run, work) + host_figures(run, work) + fp8_figures(run, work)
        if arguments.png is not None:
            draw(run, work, arguments.png)
    report("By calculation, not measured", found, arguments.json)
    return 0


if __name__ == "__main__":
    leave_after(main)
