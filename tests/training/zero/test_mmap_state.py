"""State in files: the memory is the file's, nothing is left behind, and a folder that cannot serve is named."""

from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import UserError
from bigmodel.training.zero.mmap_state import MappedFiles
from tests.support.engine_worker import state_outside_files


def test_values_and_shape_are_kept_and_the_memory_is_a_file_without_a_name(tmp_path: Path) -> None:
    tensor = torch.randn(3, 5)
    placed = MappedFiles(tmp_path).place(tensor)
    assert torch.equal(placed, tensor)
    assert state_outside_files([placed]) == 0
    assert state_outside_files([tensor]) == 1
    assert list(tmp_path.iterdir()) == []
    placed.zero_()
    assert tensor.any(), "the copy is apart"


def test_no_elements_need_no_file(tmp_path: Path) -> None:
    assert MappedFiles(tmp_path / "nowhere").place(torch.zeros(0)).numel() == 0


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_is_none_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"nvme_path = .*{folder}.*local disk"):
        MappedFiles(tmp_path / folder).place(torch.zeros(4))


def test_a_disk_too_small_is_found_before_anything_is_written(tmp_path: Path) -> None:
    four_petabytes = torch.zeros(1).expand(1 << 50)
    with pytest.raises(UserError, match=f"nvme_path = .*{1 << 52:,} bytes"):
        MappedFiles(tmp_path).place(four_petabytes)
    assert list(tmp_path.iterdir()) == []
