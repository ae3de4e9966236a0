"""The card of an export, README.md: what the model is, how it was trained and measured, and how it is opened."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cosmos_scale import __version__
from cosmos_scale.checkpoint.interchange.formats import FORMAT_NAMES, Format
from cosmos_scale.checkpoint.interchange.names import is_of_heads, tensor_shapes
from cosmos_scale.checkpoint.interchange.source import Source, Training
from cosmos_scale.checkpoint.interchange.weights import Which
from cosmos_scale.config import ModelConfig
from cosmos_scale.config.yaml_text import write_yaml
from cosmos_scale.words import counted

Records = Mapping[str, Mapping[str, float | None]]
"""What each evaluator of a run measured at the checkpoint's step: {evaluator: {"student/...": number}}."""

_LIBRARIES: dict[Format, str] = {
    "openclip": "library_name: open_clip\n",
    "hf": "library_name: transformers\n",
    "cosmos": "",
}
# Of a run's configuration: places of a machine and its network, and what changes no number.
_NOT_SHOWN = {"output", "device", "resume", "zero", "checkpoint", "eval", "log", "kernels"}
_OF_DATA = ("samples", "views", "captions", "last_batch", "background")

LEFT_OUT = (
    "The cross-modality heads and the log-scale of the distillation are left out, since the format has none: no "
    "attention maps from these files, and COSMOS training only with new heads (`init_heads: new`)."
)


class Card(NamedTuple):
    """What a card tells. models: those in the export, none where the source has one. folder: as the user named it."""

    to: Format
    models: Sequence[Which]
    source: Source
    records: Records
    command: str
    folder: str

    def text(self) -> str:
        """Return the card in Markdown."""
        parts = [
            f"---\n{_LIBRARIES[self.to]}pipeline_tag: zero-shot-image-classification\ntags: [clip, cosmos]\n---",
            f"# {self.source.name}: {self._which()}, as {FORMAT_NAMES[self.to]}",
            f"Converted from: {self.source.kind}.",
            "## Open it",
            f"```python\n{opening(self.to, self.folder)}\n```",
            "## What must be known",
            "\n".join(f"- {remark}" for remark in remarks(self.to, self.source)),
            "## Model",
            _table(("", ""), _sizes(self.source.model, self._parameters())),
            *self._training(),
            "## Made by",
            f"```bash\n{self.command}\n```",
            f"cosmos-scale {__version__} wrote these files. They name no licence: whoever shares them does.",
        ]
        return "\n\n".join(parts) + "\n"

    def summary(self) -> str:
        """Return what a terminal shows of an export: what was written, what was left out, how it is opened."""
        lines = [
            f"{self.source.path}: {self.source.kind}",
            *(f"assumed: {line}" for line in self.source.guessed),
            f"written as {FORMAT_NAMES[self.to]} to {self.folder}: {self._which()}, {self._parameters():,} parameters"
            + " each" * (len(self.models) > 1),
            *([LEFT_OUT] if self._leaves_out() else []),
            "open it with:",
            *(f"  {line}" for line in opening(self.to, self.folder).splitlines()),
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return the facts of `summary` as plain data, for JSON."""
        return {
            "checkpoint": str(self.source.path),
            "kind": self.source.kind,
            "models": list(self.models),
            "to": self.to,
            "folder": self.folder,
            "parameters": self._parameters(),
            "heads_left_out": self._leaves_out(),
            "assumed": list(self.source.guessed),
        }

    def _which(self) -> str:
        return " and ".join(self.models) or "the model"

    def _leaves_out(self) -> bool:
        return self.source.has_heads and self.to != "cosmos"

    def _parameters(self) -> int:
        """Return how many numbers one model has in the export."""
        shapes = tensor_shapes(self.source.model)
        return sum(math.prod(shape) for name, shape in shapes.items() if self.to == "cosmos" or not is_of_heads(name))

    def _training(self) -> list[str]:
        training = self.source.training
        if training is None:
            return ["## Training", "Not known: the converted file does not tell it."]
        return [
            "## Training",
            _table(("", ""), _steps(training)),
            "### Data",
            _table(("source", "weight of its samples"), _sources(training)),
            "### Measured",
            *_measured(self.records, training),
            "### Configuration",
            "Without places of data and what changes no number.",
            f"```yaml\n{write_yaml(_shown_config(training))}```",
        ]


def opening(to: Format, folder: str) -> str:
    """Return three lines of Python that open an export."""
    if to == "openclip":
        return (
            "import open_clip\n"
            f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")\n'
            f'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")'
        )
    if to == "hf":
        return (
            "from transformers import CLIPModel, CLIPProcessor, pipeline\n"
            f'model, processor = CLIPModel.from_pretrained("{folder}"), CLIPProcessor.from_pretrained("{folder}")\n'
            f'classify = pipeline("zero-shot-image-classification", model="{folder}")'
        )
    return (
        "import torch\n"
        f'checkpoint = torch.load("{folder}/cosmos.pt", weights_only=True)\n'
        'student, teacher = checkpoint["student"], checkpoint["teacher"]'
    )


def remarks(to: Format, source: Source) -> list[str]:
    """Return what a user of an export must know, each in one paragraph."""
    model, known = source.model, [f"Assumed: {line}." for line in source.guessed]
    if to == "cosmos":
        return [
            *known,
            "The file holds both models: `student`, whose names begin with `module.` as the published trainer saves "
            "them, and `teacher`, whose names do not. A program that reads it chooses.",
            "It holds no optimizer, so no training goes on from where it was.",
            "It holds no configuration: the reader must know the sizes below.",
        ]
    if source.has_heads:
        known.append(LEFT_OUT)
    known.append(
        f"The towers' activation is {model.activation}; the configuration beside the weights says so, and programs "
        "that do not read it must be told."
    )
    if to == "openclip":
        return [
            *known,
            "Pictures of the size below give the features of cosmos-scale. For other sizes OpenCLIP resizes the "
            "position table in another way than COSMOS does.",
        ]
    return [
        *known,
        "Equal tensors give equal features (to 1e-5). Equal files need not: the image processor of transformers cuts "
        "the middle of a picture one pixel beside ours where the resized picture is wider or higher than the model's "
        "by 3, 7, 11, ... pixels, and its default back end (torchvision) is up to one grey level away. Of the two, "
        "`CLIPImageProcessorPil` is the nearer one.",
        f"Give `truncation=True` for captions that may have more than {model.text.context_length} tokens.",
        "The tokenizer of transformers neither mends broken Unicode nor resolves HTML entities (`&amp;`), which ours "
        "and OpenCLIP's do before; the ids of other captions are equal.",
        "In transformers 5 `get_image_features` returns an object: the features are its `pooler_output`, not "
        "normalised.",
    ]


def _sizes(model: ModelConfig, parameters: int) -> list[tuple[str, str]]:
    vision, text = model.vision, model.text
    return [
        ("parameters", f"{parameters:,}"),
        ("image tower", f"{vision.layers} blocks of width {vision.width}, {vision.width // vision.head_width} heads"),
        ("pictures", f"{vision.image_size} px, patches of {vision.patch_size} px"),
        ("text tower", f"{text.layers} blocks of width {text.width}, {counted(text.heads, 'head')}"),
        ("captions", f"{text.context_length} tokens of {text.vocab_size:,}"),
        ("features", f"{model.embed_dim} numbers"),
        ("activation", model.activation),
        ("numbers", "float32"),
    ]


def _steps(training: Training) -> list[tuple[str, str]]:
    state, config, manifest = training.manifest.state, training.config, training.manifest
    each = state.steps_per_epoch
    epochs = "not known" if each is None else f"{state.step / each:.3f} ({counted(each, 'step')} each)"
    lost = counted(len(state.lost_shards), "shard") + " given up" if state.lost_shards else "none"
    return [
        ("first weights", state.origin or "drawn, or not known"),
        ("step", f"{state.step:,}"),
        ("samples seen", f"{state.samples:,}"),
        ("epochs", epochs),
        ("global batch", f"{config.train.global_batch:,}"),
        ("ranks", f"{state.world_size:,}"),
        ("precision", f"computed in {config.precision}, saved in fp32"),
        ("digest of the data's index", state.data),
        ("lost data", lost),
        ("written", f"{manifest.written.replace('T', ' ').removesuffix('+00:00')} UTC"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]


def _sources(training: Training) -> list[tuple[str, str]]:
    return [(source.name, f"{source.weight:g}") for source in training.config.data.sources]


def _measured(records: Records, training: Training) -> list[str]:
    """Return a table for each evaluator: a row for each number, a column for each model."""
    step = training.manifest.state.step
    if not records:
        return [f"Nothing: no evaluation at step {step:,} in a metrics.jsonl beside the checkpoint."]
    kinds = {section.name: section.kind for section in training.config.eval}
    parts = []
    for evaluator, numbers in records.items():
        kind = kinds.get(evaluator, evaluator)
        parts.append(f"`{evaluator}` at step {step:,}" + (f" ({kind}):" if kind != evaluator else ":"))
        names = list(dict.fromkeys(key.partition("/")[2] for key in numbers))
        rows = [(name, *(_number(numbers, f"{model}/{name}") for model in ("student", "teacher"))) for name in names]
        parts.append(_table(("", "student", "teacher"), rows))
    return parts


def _number(numbers: Mapping[str, float | None], key: str) -> str:
    value = numbers.get(key)
    if value is None:
        return "not finite" if key in numbers else ""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4f}"


def _shown_config(training: Training) -> dict[str, Any]:
    plain = training.config.model_dump(mode="json")
    data = {key: plain["data"][key] for key in _OF_DATA}
    return {key: data if key == "data" else value for key, value in plain.items() if key not in _NOT_SHOWN}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
