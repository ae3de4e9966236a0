"""cosmos-scale: pre-training of COSMOS vision-language models on DeepSpeed, from one CPU to hundreds of GPUs."""

__version__ = "0.1.0"
