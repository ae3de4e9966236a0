"""Links among the folders of classes that lead nowhere, and a folder around those of the classes."""

from pathlib import Path

import pytest

from cosmos_scale.errors import UserError
from cosmos_scale.evaluation.datasets.labelled_sets import open_labelled_set
from tests.evaluation.labelled import section, write_folders


def test_a_link_to_a_class_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    """As where the disk of a class is not mounted: the class would be gone from the numbers."""
    root = write_folders(tmp_path / "set", [2, 1])
    (root / "yak").symlink_to(tmp_path / "disk" / "yak")
    with pytest.raises(UserError, match=f"^{root}: its link yak leads nowhere, to {tmp_path}/disk/yak, where a class"):
        open_labelled_set(section(root))
    (tmp_path / "disk" / "yak").mkdir(parents=True)
    assert len(open_labelled_set(section(root)).names) == 3


def test_a_link_below_a_class_that_leads_nowhere_is_counted(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "set", [2, 1])
    (link := next(root.iterdir()) / "2024").symlink_to(tmp_path / "disk" / "2024")
    pictures = open_labelled_set(section(root)).pictures
    assert pictures.passed_over["behind a link that leads nowhere"] == [str(link.relative_to(root))]


def test_a_folder_around_the_classes_is_no_class(tmp_path: Path) -> None:
    """As an archive unpacks: one class would be measured, with every answer right."""
    write_folders(tmp_path / "flower_photos", [1, 2])
    with pytest.raises(UserError, match=f"^{tmp_path}: its folder flower_photos is no class.*; name one part"):
        open_labelled_set(section(tmp_path))
    assert len(open_labelled_set(section(tmp_path / "flower_photos")).names) == 2
