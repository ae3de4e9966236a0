"""Training: build everything, loop, done. `cosmos-scale train`, or `deepspeed --module cosmos_scale.train`."""

from cosmos_scale.config import RunConfig
from cosmos_scale.engine.ranks import Ranks
from cosmos_scale.engine.schedule import ema_momentum, learning_rate
from cosmos_scale.loss.cosmos_loss import CosmosLoss
from cosmos_scale.run.lookahead import Lookahead, StopRequest
from cosmos_scale.run.progress import Progress
from cosmos_scale.run.run import prepare
from cosmos_scale.step import train_step


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
            if run.retrieval is not None and step % config.eval.every == 0:
                with progress.pause():
                    progress.evaluation(step, run.evaluate(student, teacher))
            if config.checkpoint.every and step % config.checkpoint.every == 0 and step < last_step:
                with progress.pause():
                    checkpoints.save(run.state(step, student))
        progress.read_pending()
        if step > run.first_step:
            checkpoints.save(run.state(step, student))
            progress.say(f"checkpoint: {checkpoints.wait()}")


if __name__ == "__main__":
    import sys

    from cosmos_scale.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
