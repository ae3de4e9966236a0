"""Training: build everything, loop, done. `cosmos-scale train`, or `deepspeed --module cosmos_scale.train`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cosmos_scale.checkpoint import newest
from cosmos_scale.cli.arguments import positive
from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import load_config
from cosmos_scale.engine.ranks import Ranks, lost_contact, start_ranks
from cosmos_scale.engine.schedule import ema_momentum, learning_rate
from cosmos_scale.errors import UserError
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.run.explain import explain
from cosmos_scale.run.lookahead import Lookahead, StopRequest
from cosmos_scale.run.progress import Progress
from cosmos_scale.run.run import prepare
from cosmos_scale.step import train_step

EXAMPLES = """examples:
  cosmos-scale train configs/run/demo.yaml train.max_steps=20
  cosmos-scale train --dry-run --world-size 128 configs/run/merged30m_vitb16.yaml
  deepspeed --num_accelerators 2 --module cosmos_scale.train configs/run/demo.yaml
"""


def train(config: RunConfig, ranks: Ranks, stop: StopRequest) -> None:
    """Train until the last step or a stop; collective. Raises UserError on all ranks alike."""
    run = prepare(config, ranks)
    total_steps = config.total_steps(run.loader.steps_per_epoch)
    last_step = config.last_step(run.loader.steps_per_epoch)
    student, teacher = run.build_models()
    cosmos_loss = CosmosLoss(config.optimizer.gradient_scale)
    step = run.first_step

    progress = Progress(config, ranks, run.folder, first_step=step, last_step=last_step)
    with progress, run.writer(student) as checkpoints:
        progress.say(run.describe(last_step))
        ahead = Lookahead(run.loader, step, ranks, stop, progress.say)
        if config.checkpoint.at_start and run.start.checkpoint is None:
            checkpoints.save(run.state(0, student))
        if step < last_step:
            ahead.fetch()
        while step < last_step:
            batch = ahead.take()
            if batch is None:
                progress.say(f"stopping after step {step} of {last_step}: a signal, or train.max_minutes")
                break
            lr = learning_rate(step, config.optimizer, total_steps)
            momentum = ema_momentum(step, config.ema, total_steps)
            output = train_step(student, teacher, cosmos_loss, batch, lr=lr, momentum=momentum)
            step += 1
            if step < last_step:
                ahead.fetch()
            progress.after_step(step, output, batch, student, lr=lr, momentum=momentum, data_wait=ahead.waited())
            if run.evaluations.due(step):
                with progress.pause():
                    run.evaluations.run_due(step, student, teacher, progress)
            if config.checkpoint.every and step % config.checkpoint.every == 0 and step < last_step:
                with progress.pause():
                    checkpoints.save(run.state(step, student))
        progress.read_pending()
        if step > run.first_step:
            checkpoints.save(run.state(step, student))
            progress.say(f"checkpoint: {checkpoints.wait()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 where the user has something to mend."""
    arguments = _parser().parse_intermixed_args(argv)
    ranks = None
    try:
        config = load_config(arguments.run, arguments.overrides)
        if arguments.dry_run:
            explain(config, arguments.world_size)
            return 0
        ranks = start_ranks(config.device)
        if ranks.is_main:  # what the package tells of its choices, attention's back end for one
            logging.basicConfig(stream=sys.stdout, format="%(message)s")
            logging.getLogger("cosmos_scale").setLevel(logging.INFO)
        with StopRequest(config.train.max_minutes) as stop:
            train(config, ranks, stop)
    except UserError as error:
        # All ranks agree on an error once they run together; before that each machine tells its own.
        if ranks.is_main if ranks else os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"cosmos-scale train: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output (head, a pager) has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 141
    except KeyboardInterrupt:
        print("cosmos-scale train: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if ranks is None or not lost_contact(error):
            raise
        newest_checkpoint = newest(config.output / config.name / "checkpoints")
        print(
            f"cosmos-scale train: rank {ranks.rank} lost contact with another rank, which ended or cannot be reached "
            f"({str(error).splitlines()[0]}); newest checkpoint: {newest_checkpoint or 'none'}",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cosmos-scale train",
        description="Train a COSMOS model in one process, or in many under the deepspeed launcher.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN.yaml", help="the run's YAML file")
    # With a default of its own, or argparse calls it required.
    parser.add_argument(
        "overrides", nargs="*", default=(), metavar="key=value", help="dotted keys that replace the file's"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and exit")
    parser.add_argument(
        "--world-size", type=positive, default=1, metavar="N", help="ranks to plan a dry run for (default: 1)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


if __name__ == "__main__":
    sys.exit(main())
