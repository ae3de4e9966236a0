"""Training: build everything, loop, done. `cosmos-scale train`, or `deepspeed --module cosmos_scale.train`."""

# Before the imports below: they take seconds, and the command sets variables that torch reads when it is imported.
if __name__ == "__main__":
    import os
    import sys
    from functools import partial

    # Started as a file, as by `torchrun cosmos_scale/train.py`, its folder comes first on the path; there our `profile`
    # would hide Python's, which torch imports.
    if not __package__:
        _folder = os.path.dirname(os.path.realpath(__file__))
        sys.path[:] = [os.path.dirname(_folder), *(path for path in sys.path if os.path.realpath(path) != _folder)]

    from cosmos_scale.import_path import libraries_first

    libraries_first()

    from cosmos_scale.interrupt import refuse_to_import, tell_interrupts

    tell_interrupts("cosmos-scale train")
    refuse_to_import("cosmos-scale train")

    from cosmos_scale.cli.leave import leave_after
    from cosmos_scale.cli.main import main

    leave_after(partial(main, ["train", *sys.argv[1:]]))

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.engine.schedule import ema_momentum, learning_rate
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.run.lookahead import Lookahead
from cosmos_scale.run.run import start_run
from cosmos_scale.run.stop_request import StopRequest
from cosmos_scale.run.watchdog import Watchdog
from cosmos_scale.step import train_step


def train(config: RunConfig, ranks: Ranks, stop: StopRequest, watchdog: Watchdog) -> None:
    """Train until the last step or a stop; collective. Raises UserError on all ranks alike."""
    run = start_run(config, ranks)
    student, teacher = run.pair
    cosmos_loss = CosmosLoss(config.optimizer.gradient_scale, kernels=config.kernels)
    step, last_step = run.first_step, run.last_step

    with (
        run.opened.held,
        run.writer() as checkpoints,
        run.progress(checkpoints) as progress,
        watchdog.before("the end of the records", progress.longest_end),
    ):
        progress.begin(run.describe())
        if config.checkpoint.at_start and run.start.checkpoint is None:
            checkpoints.save(run.state(0, progress))
        if step > 0:
            with progress.pause(), watchdog.longer(f"the evaluation of step {step}") as goes_on:
                run.opened.evaluations.run_missed(step, last_step, student, teacher, progress, goes_on)
        ahead = Lookahead(
            run.loader,
            ranks,
            stop,
            progress.say,
            first=step,
            last=last_step,
            unsaved=checkpoints.unsaved,
            enter=watchdog.enter,
        )
        for batch, wait_seconds, unsaved in ahead:
            if unsaved:
                with progress.pause(), watchdog.longer(f"the checkpoint after step {step}"):
                    checkpoints.save_again()
            lr = learning_rate(step, config.optimizer, run.total_steps)
            momentum = ema_momentum(step, config.ema, run.total_steps)
            output = train_step(student, teacher, cosmos_loss, batch, lr=lr, momentum=momentum)
            step += 1
            progress.after_step(step, output, batch, lr=lr, momentum=momentum, wait_seconds=wait_seconds)
            watchdog.step_done()
            if config.checkpoint.every and step % config.checkpoint.every == 0 and step < last_step:
                with progress.pause(), watchdog.longer(f"the checkpoint after step {step}"):
                    checkpoints.save(run.state(step, progress))
            if step < last_step and run.opened.evaluations.due(step):
                with progress.pause(), watchdog.longer(f"the evaluation of step {step}") as goes_on:
                    run.opened.evaluations.run_due(step, student, teacher, progress, goes_on)
        progress.read_pending()
        if ahead.stopped_by is not None and ahead.failure is None:
            progress.stopping(step, ahead.stopped_by)
        if step > run.first_step:
            with watchdog.longer(f"the last checkpoint, after step {step}"):
                checkpoints.save(run.state(step, progress))
                progress.say(f"checkpoint: {checkpoints.finish()}")
        if ahead.failure is not None:
            raise ahead.failure
        if run.first_step < step == last_step:
            with watchdog.longer(f"the evaluation of step {step}") as goes_on:
                run.opened.evaluations.run_all(step, student, teacher, progress, goes_on)
