"""Patterns that mean too much are refused before they are expanded."""

from pathlib import Path

import pytest

from cosmos_scale.data.shards.patterns import parse_pattern
from cosmos_scale.errors import UserError


@pytest.mark.parametrize("pattern", ["/none/{000000..99999999999}.tar", "https://host/{0..9999}/{9999..0}.tar"])
def test_a_range_past_any_dataset_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="its braces mean more than 10,000,000 shards"):
        parse_pattern(pattern).list_names()


def test_a_long_range_with_a_wide_step_is_not() -> None:
    assert len(parse_pattern("https://host/{0..20000000..10000000}.tar").list_names()) == 3


def test_a_folder_means_its_shards_that_are_not_hidden(tmp_path: Path) -> None:
    for name in ("0.tar", "._0.tar"):  # macOS lays the second one beside the first on foreign disks
        (tmp_path / name).touch()
    assert parse_pattern(str(tmp_path)).list_names() == ["0.tar"]
