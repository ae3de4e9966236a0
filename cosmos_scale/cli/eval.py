"""The commands `cosmos-scale eval KIND`, an evaluator of each kind on a checkpoint, and `eval all`, on all sets."""

import argparse

from cosmos_scale.cli.eval_all import add_eval_all_command
from cosmos_scale.cli.eval_classification import CLASSIFICATION
from cosmos_scale.cli.eval_command import add_eval_command
from cosmos_scale.cli.eval_retrieval import RETRIEVAL
from cosmos_scale.cli.eval_segmentation import SEGMENTATION

KIND_COMMANDS = (RETRIEVAL, CLASSIFICATION, SEGMENTATION)

EXAMPLES = """\
examples:
  cosmos-scale eval retrieval --checkpoint runs/demo/checkpoints --data shards/held_out
  cosmos-scale eval classification --checkpoint runs/demo/checkpoints --data pictures/by_class --weights both
  cosmos-scale eval segmentation --checkpoint runs/demo/checkpoints --set voc20 --root data/VOC2012 --csa
  cosmos-scale eval all --checkpoint runs/demo/checkpoints --data-root /data --published merged30m_vitb16
  torchrun --nproc-per-node 8 -m cosmos_scale.cli eval classification --dataset imagenet ...
"""


def add_eval_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add every kind of evaluation; each parser's defaults say its name (`command`) and what runs it (`run`)."""
    for command in KIND_COMMANDS:
        add_eval_command(commands, command)
    add_eval_all_command(commands)
