"""The command `cosmos-scale plan`: what a run will ask of a cluster, counted from the project's own step."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_scale.cli.arguments import path, place, positive, run_file, with_examples
from cosmos_scale.errors import UserError
from cosmos_scale.words import counted

if TYPE_CHECKING:
    from cosmos_scale.config import RunConfig

EXAMPLES = """\
examples:
  cosmos-scale plan merged30m_vitb16 --nodes 16 --gpus 8 --gpu h100
  cosmos-scale plan my_run.yaml zero.stage=3 --nodes 2 --gpus 8 --gpu a100-40
  cosmos-scale plan my_run.yaml --gpus 8 --machine machine.json --json plan.json
  cosmos-scale plan my_run.yaml --nodes 16 --gpu h100 --sweep --out sweep
  cosmos-scale plan my_run.yaml train.global_batch=32 --calibrate machine.json
"""
GPUS = ("a100-40", "a100-80", "h100", "h200", "b200")
# What every file has that this command writes: other files are not replaced.
PLAN_SIGN, MACHINE_SIGN, TABLE_SIGN = b'"cluster":', b'"memory_rate":', b"gpus,zero_stage"


def add_plan_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = with_examples(commands.add_parser("plan", help="what a run will ask of a cluster"), EXAMPLES)
    parser.description = (
        "Count a step of a run as one rank of a cluster would do it, without GPUs and without the other ranks:\n"
        "memory, largest batches, work and traffic. The step is the trainer's own; nothing is computed. Then time it\n"
        "by rates: those of data sheets, within a range, or those that --calibrate measured on such a machine. It\n"
        "takes about a minute, at ZeRO stage 3 with hundreds of ranks some minutes."
    )
    parser.add_argument(
        "file",
        type=place,
        metavar="RUN.yaml",
        help="the run's YAML file, or a shipped run's name (cosmos-scale configs)",
    )
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key=value", help="dotted keys that replace the file's"
    )
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--gpus", type=positive, default=8, metavar="M", help="GPUs of a node, or ranks of a host of CPUs (default: 8)"
    )
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--gpu", choices=GPUS, help="kind of GPU")
    kinds.add_argument("--machine", type=path, metavar="FILE", help="instead: a machine's JSON file")
    kinds.add_argument(
        "--calibrate",
        type=path,
        metavar="FILE",
        help="plan nothing: take steps of the run on this machine, and write its file; under a launcher on all ranks",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the plan as JSON")
    parser.add_argument(
        "--sweep", action="store_true", help="also plan 1 to 1,024 GPUs at each ZeRO stage: sweep.csv, sweep.png"
    )
    parser.add_argument("--out", type=path, metavar="FOLDER", help="of --sweep's files (default: the current folder)")
    parser.set_defaults(command="plan", run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from cosmos_scale.config.load import load_config

    config = load_config(run_file(arguments.file), arguments.overrides)
    if arguments.out and not arguments.sweep:
        arguments.parser.error("--out: names the folder of --sweep's files; give --sweep too")
    if arguments.calibrate and (arguments.json or arguments.sweep):
        arguments.parser.error("--calibrate: plans nothing; leave out --json and --sweep")
    if arguments.calibrate:
        _try_to_write(arguments.calibrate, MACHINE_SIGN, "machine's file")
    elif arguments.json:
        _try_to_write(arguments.json, PLAN_SIGN, "plan")
    if arguments.calibrate:
        return _calibrate(config, arguments.calibrate)
    # These imports take seconds. The config comes first, so that its mistakes are told at once.
    from cosmos_scale.files import keep_foreign, make_output_folder
    from cosmos_scale.profiling.machine import MACHINES, read_machine
    from cosmos_scale.profiling.plan import Cluster, make_plan
    from cosmos_scale.profiling.plan_files import SWEEP_GPUS, TABLE, write_plan, write_sweep
    from cosmos_scale.profiling.plan_text import head_lines, memory_lines, traffic_lines, work_lines
    from cosmos_scale.profiling.plan_time import planned_time
    from cosmos_scale.profiling.plan_time_text import PlannedRun, remedy_lines, scaling_lines, time_lines
    from cosmos_scale.profiling.remedies import count_variants, remedies, scaling

    machine = MACHINES[arguments.gpu] if arguments.gpu else read_machine(arguments.machine)
    if arguments.sweep:
        keep_foreign((arguments.out or Path()) / TABLE, TABLE_SIGN, "table of --sweep")
        make_output_folder(arguments.out or Path())
    cluster = Cluster(arguments.nodes, arguments.gpus, machine)
    config.samples_per_rank(cluster.world_size)
    print(f"plan: counting steps of {counted(cluster.world_size, 'rank')} ...", file=sys.stderr, flush=True)
    plan = make_plan(config, cluster)
    print("plan: counting what would help ...", file=sys.stderr, flush=True)
    variants = count_variants(plan)
    time = planned_time(config, plan.counts, cluster)
    run = PlannedRun(plan, time, _steps(config), remedies(plan, time, variants), scaling(plan, variants))
    lines = [list(section(plan)) for section in (head_lines, memory_lines, work_lines, traffic_lines)]
    lines += [list(section(run)) for section in (time_lines, remedy_lines, scaling_lines)]
    print("\n\n".join("\n".join(section) for section in lines))
    if arguments.json:
        write_plan(run, arguments.json)
    if arguments.sweep:
        title = f"{config.name}, {counted(plan.counts.samples, 'sample')} a {machine.unit}, {machine.name}"
        write_sweep(scaling(plan, variants, SWEEP_GPUS), title, arguments.out or Path())
    return 0


def _steps(config: "RunConfig") -> int | None:
    """Return the steps of the whole run; None where the config alone does not tell."""
    from cosmos_scale.data.training.order import steps_per_epoch

    if config.data.samples is None:
        return config.train.max_steps or config.train.schedule_steps
    return config.last_step(steps_per_epoch(config.data.samples, config))


def _try_to_write(file: Path, sign: bytes, what: str) -> None:
    """Raise UserError where a file cannot be written, or another one is there: the work before it takes minutes."""
    import tempfile

    from cosmos_scale.files import keep_foreign, writing

    keep_foreign(file, sign, what)
    with writing(file), tempfile.TemporaryFile(dir=file.parent):
        if file.is_dir():
            raise UserError(f"{file}: is a folder; rule: name a file")


def _calibrate(config: "RunConfig", file: Path) -> int:
    from cosmos_scale.engine.ranks import start_ranks
    from cosmos_scale.files import replace_file, writing
    from cosmos_scale.profiling.calibrate import calibrate
    from cosmos_scale.profiling.machine import calibrated_machine

    ranks = start_ranks(config.device, config.log.level)
    samples = config.samples_per_rank(ranks.world_size)
    if ranks.is_main:
        print(
            f"plan: measuring this machine with steps of {counted(samples, 'sample')} ...", file=sys.stderr, flush=True
        )
    calibration = calibrate(config, samples, ranks)
    if ranks.is_main:
        machine = calibrated_machine(calibration)
        with writing(file):
            replace_file(file, machine.to_json().encode())
        print(
            f"{file}: {machine.name}; products up to {machine.products:.3g} TFLOP/s, copies {machine.memory_rate:.3g} "
            f"TB/s, a step took {calibration.factor:.2f} of its parts' sum"
        )
    return 0
