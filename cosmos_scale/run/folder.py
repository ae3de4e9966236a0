"""A run's folder: it is made and looked at before any work, so that what is wrong with it is told at once."""

from pathlib import Path

from cosmos_scale.config import RunConfig
from cosmos_scale.config.load import dump_config
from cosmos_scale.errors import UserError
from cosmos_scale.files import whole_file

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
DAMAGE_FILE = "damaged.jsonl"
CHECKPOINTS = "checkpoints"


def prepare_folder(config: RunConfig, folder: Path) -> None:
    """Make a run's folder and leave the resolved configuration there; raises UserError where it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_FILE, METRICS_FILE, DAMAGE_FILE):
            if (folder / name).exists() and not (folder / name).is_file():
                raise UserError(f"output: {folder / name} is no file; rule: move it away, since the run writes a file")
        for name in (CHECKPOINTS, "tensorboard", "wandb", *(evaluator.name for evaluator in config.eval)):
            if (folder / name).exists() and not (folder / name).is_dir():
                raise UserError(f"output: {folder / name} is no folder; rule: move it away, since the run makes one")
        with whole_file(folder / CONFIG_FILE) as part:
            part.write_text(dump_config(config), encoding="utf-8")
        for name in (METRICS_FILE, DAMAGE_FILE):
            if (folder / name).exists():
                (folder / name).open("ab").close()
    except OSError as failure:
        raise UserError(f"output: {folder} cannot be written to: {failure.strerror}") from failure
