"""YAML that Python cannot hold is the user's error."""

import pytest

from cosmos_scale.config.yaml_text import parse_yaml
from cosmos_scale.errors import UserError


def test_a_number_of_too_many_digits_is_refused() -> None:
    with pytest.raises(UserError, match=r"^run\.yaml: is not valid YAML: Exceeds the limit"):
        parse_yaml(f"seed: {'9' * 5000}", "run.yaml")
