"""On a short loan of a GPU the type that is trained in comes first."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """fp16 and fp32 after bf16 and all that has no type; tests elsewhere stay where they are."""
    items.sort(key=lambda item: "tests/gpu/" in item.nodeid and "torch.float" in item.name)
