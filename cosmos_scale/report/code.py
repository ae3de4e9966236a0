"""Which code a run's launches had, as their records of the start say."""

from cosmos_scale.report.records import Record, RunRecords

SHORT = 12  # signs of a commit
NOT_RECORDED = "not recorded"


def code_of(start: Record) -> str:
    """Return the code of a launch in words, empty where its record does not say it."""
    version, commit, sources = (_text(start, key) for key in ("version", "commit", "sources"))
    if not version:
        return ""
    said = f"cosmos-scale {version}"
    if commit:
        said += f", commit {commit[:SHORT]}"
        said += " with changes" if start.get("modified") is True else ""
    return f"{said}, sources {sources}" if sources else said


def last_code_of(run: RunRecords) -> str:
    """Return the code of the newest launch that says it; empty where none does."""
    return next((code for start in reversed(run.starts) if (code := code_of(start))), "")


def changed_code(run: RunRecords) -> list[tuple[int, str]]:
    """Return the first steps of launches whose code is not that of the launch before, each with its code in words."""
    found: list[tuple[int, str]] = []
    for start in run.starts:
        code = code_of(start)
        if not found or found[-1][1] != code:
            found.append((int(start["step"]), code))
    return found


def note_on_code(run: RunRecords) -> str:
    """Return a sentence where launches of a run had different code; empty where all had the same."""
    changes = changed_code(run)
    if len(changes) < 2:
        return ""
    each = "; ".join(f"after step {step:,}: {code or NOT_RECORDED}" for step, code in changes)
    return f"its launches ran different code: {each}."


def _text(record: Record, key: str) -> str:
    value = record.get(key)
    return value if isinstance(value, str) else ""
