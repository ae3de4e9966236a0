"""The launch of a run on one host or many: hosts looked at, ranks started, watched, stopped and started again."""
