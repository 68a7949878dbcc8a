"""Below `**` each real file is found once, under a name that links do not decide."""

import os
from pathlib import Path

import pytest

from bigmodel.data.store import files


def made(root: Path, *names: str, **links: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name, target in links.items():
        (root / name.replace("__", "/")).symlink_to(root / target)
    return root


def found(root: Path, pattern: str) -> tuple[list[str], list[str]]:
    """Names below root, and what was said."""
    said: list[str] = []
    names = files.find(f"{root}/{pattern}", said.append)
    return [name.removeprefix(f"{root}/") for name in names], [line.replace(f"{root}/", "") for line in said]


def test_two_loops_of_links_end_and_are_said(tmp_path: Path) -> None:
    """glob would go through 2**40 names."""
    root = made(tmp_path, "a/x.txt", "a/deep/y.txt", a__loop="a", a__deep__up="", self="self")
    expected = ["a/deep/y.txt", "a/x.txt"]
    assert found(root, "**/*.txt") == (
        expected,
        ["**/*.txt: passed over a/deep/up and 1 more: read under another name"],
    )
    assert found(root, "**/**/*.txt")[0] == found(root, "a/**/*.txt")[0] == expected
    assert files.find(f"file://{root}/**/*.txt") == [f"file://{root}/{name}" for name in expected]


def test_a_folder_and_a_file_behind_links_are_found_under_their_own_names(tmp_path: Path) -> None:
    made(tmp_path / "elsewhere", "far/z.txt")
    root = made(tmp_path / "root", "z2023/x.txt", "b.txt", a="z2023", c="../elsewhere", d="c")
    (root / "a.txt").symlink_to(root / "b.txt")
    names, said = found(root, "**/*.txt")
    assert names == ["b.txt", "c/far/z.txt", "z2023/x.txt"]
    assert said == ["**/*.txt: passed over a.txt and 2 more: read under another name"]
    assert found(root, "*.txt") == (["a.txt", "b.txt"], [])  # named one by one
    assert found(root, "a/*.txt") == (["a/x.txt"], [])


def test_all_below_a_folder_are_its_files_and_no_folders(tmp_path: Path) -> None:
    root = made(tmp_path, "a/x.txt", "a/deep/y.txt")
    assert [found(root, pattern)[0] for pattern in ("**", "**/*")] == [["a/deep/y.txt", "a/x.txt"]] * 2
    assert found(root, "**/d*")[0] == ["a/deep"]  # what is inside does not match: to be named


def test_hidden_folders_stay_hidden_and_patterns_go_on_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made(tmp_path, ".git/x.txt", "a/.y.txt", "a/b/z.txt", "a/b/c/z.txt", "[x]/b/z.txt")
    assert found(root, "**/*.txt")[0] == ["[x]/b/z.txt", "a/b/c/z.txt", "a/b/z.txt"]
    assert found(root, "**/b/*.txt")[0] == ["[x]/b/z.txt", "a/b/z.txt"]
    assert found(root, "a/**/c/**/*.txt")[0] == ["a/b/c/z.txt"]
    assert found(root, "**/.*.txt")[0] == ["a/.y.txt"]
    monkeypatch.chdir(root)
    assert files.find("**/z.txt") == ["[x]/b/z.txt", "a/b/c/z.txt", "a/b/z.txt"]
    assert files.find("a/**") == ["a/b/c/z.txt", "a/b/z.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_said(tmp_path: Path) -> None:
    root = made(tmp_path, "a.txt", "closed/b.txt")
    (root / "closed").chmod(0)
    try:
        assert found(root, "**/*.txt") == (
            ["a.txt"],
            ["**/*.txt: passed over closed: cannot be listed: Permission denied"],
        )
    finally:
        (root / "closed").chmod(0o700)
