"""The stages of `tools/gpu_report.py`: each measures or checks one thing on one device, in a process of its own."""
