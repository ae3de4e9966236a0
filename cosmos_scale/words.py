"""Numbers in sentences: "1 shard", "2 shards"."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, in the plural unless the number is 1. plural: where an s more is not enough."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
