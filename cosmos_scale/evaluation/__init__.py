"""Evaluation: numbers that say what a student or a teacher can do.

A new evaluator goes into three places: its keys into `config/evaluation.py`; its class, which derives from `Evaluator`
(`evaluator.py`), into a file of its own here; and a line that joins both into `kinds.py`. Training then runs it at its
steps. A parser in `cli/eval.py` makes it a command.
"""
