"""Checkpoints in the formats of other programs: COSMOS .pt files, OpenCLIP, and Hugging Face's CLIPModel."""
