"""The command `cosmos-scale plan`: what a run will ask of a cluster, counted from the project's own step."""

import argparse
import sys

from cosmos_scale.cli.arguments import path, place, positive, run_file, with_examples

EXAMPLES = """\
examples:
  cosmos-scale plan merged30m_vitb16 --nodes 16 --gpus 8 --gpu h100
  cosmos-scale plan my_run.yaml zero.stage=3 --nodes 2 --gpus 8 --gpu a100-40
  cosmos-scale plan my_run.yaml --gpus 8 --machine machine.json
"""
GPUS = ("a100-40", "a100-80", "h100", "h200", "b200")


def add_plan_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the defaults of its parser are its name (`command`) and its function (`run`)."""
    parser = with_examples(commands.add_parser("plan", help="what a run will ask of a cluster"), EXAMPLES)
    parser.description = (
        "Count a step of a run as one rank of a cluster would do it, without GPUs and without the other ranks:\n"
        "memory, largest batches, work and traffic. The step is the trainer's own, but nothing is computed. It takes\n"
        "half a minute, and minutes at ZeRO stage 3 with hundreds of ranks."
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
    parser.add_argument("--gpus", type=positive, default=8, metavar="M", help="GPUs of a node (default: 8)")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--gpu", choices=GPUS, help="kind of GPU")
    kinds.add_argument("--machine", type=path, metavar="FILE", help="instead: a machine's JSON file")
    parser.set_defaults(command="plan", run=_run, parser=parser)


def _run(arguments: argparse.Namespace) -> int:
    from cosmos_scale.config.load import load_config

    config = load_config(run_file(arguments.file), arguments.overrides)
    # These imports take seconds. The config comes first, so that its mistakes are told at once.
    from cosmos_scale.profiling.machine import MACHINES, read_machine
    from cosmos_scale.profiling.plan import Cluster, make_plan
    from cosmos_scale.profiling.plan_text import head_lines, memory_lines, traffic_lines, work_lines

    machine = MACHINES[arguments.gpu] if arguments.gpu else read_machine(arguments.machine)
    cluster = Cluster(arguments.nodes, arguments.gpus, machine)
    config.samples_per_rank(cluster.world_size)
    print(f"plan: counting steps of {cluster.world_size:,} ranks ...", file=sys.stderr, flush=True)
    plan = make_plan(config, cluster)
    sections = (head_lines, memory_lines, work_lines, traffic_lines)
    print("\n\n".join("\n".join(section(plan)) for section in sections))
    return 0
