"""Evaluation: numbers that say what a student or a teacher can do.

A new evaluator goes into these places: its keys into a section of `config/evaluation.py`, which `AnyEvaluatorConfig`
there and `config/__init__.py` name too; its class, which derives from `Evaluator` (`evaluator.py`), into a file of its
own here; and a line that joins both into `kinds.py`. Training then runs it at its steps. A parser in `cli/eval.py`
makes it a command. `make docs` writes its keys into `docs/config.md`.
"""
