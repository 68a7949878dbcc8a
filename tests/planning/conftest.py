"""Plans of this folder's tests find no prepared data unless a test writes some."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _empty_working_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("working")
    monkeypatch.chdir(folder)
    return folder
