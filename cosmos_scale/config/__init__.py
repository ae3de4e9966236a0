"""The typed configuration of a run, one file a section: every key, its default, its unit and the rules between keys.

`cosmos_scale.config.load` reads it from YAML (extends, dotted overrides). The marks of `section.py` say which keys may
change on resume and which may differ by host; every other key belongs to the run's identity. `docs/config.md` lists all
keys; `reference.py` makes it.
"""

from cosmos_scale.config.checkpoint import CheckpointConfig
from cosmos_scale.config.classification import ClassificationConfig
from cosmos_scale.config.data import (
    BACKGROUND,
    BlurConfig,
    CaptionSampling,
    CaptionsConfig,
    DaliConfig,
    DataConfig,
    JitterConfig,
    RemoteConfig,
    SourceConfig,
    ViewsConfig,
)
from cosmos_scale.config.ema import EmaConfig
from cosmos_scale.config.evaluator import EvaluatorConfig
from cosmos_scale.config.log import LogConfig, WandbConfig
from cosmos_scale.config.model import TOKENIZER_VOCABULARY, ModelConfig, TextConfig, VisionConfig
from cosmos_scale.config.optimizer import OptimizerConfig
from cosmos_scale.config.retrieval import RetrievalConfig
from cosmos_scale.config.run import RunConfig
from cosmos_scale.config.segmentation import SegmentationConfig
from cosmos_scale.config.train import TrainConfig
from cosmos_scale.config.zero import ZeroConfig

__all__ = [
    "BACKGROUND",
    "TOKENIZER_VOCABULARY",
    "BlurConfig",
    "CaptionSampling",
    "CaptionsConfig",
    "CheckpointConfig",
    "ClassificationConfig",
    "DaliConfig",
    "DataConfig",
    "EmaConfig",
    "EvaluatorConfig",
    "JitterConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RemoteConfig",
    "RetrievalConfig",
    "RunConfig",
    "SegmentationConfig",
    "SourceConfig",
    "TextConfig",
    "TrainConfig",
    "ViewsConfig",
    "VisionConfig",
    "WandbConfig",
    "ZeroConfig",
]
