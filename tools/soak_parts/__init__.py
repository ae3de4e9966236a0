"""The parts of tools/soak.py: hosts, the launched run, what disturbs it, and the comparison of losses."""
