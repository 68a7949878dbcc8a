"""Uneven lanes: the share out of reach is what an order really leaves, and the remedies hold."""

import re
from collections import deque
from typing import Any

import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.advice.lane_advice import lane_warning, repeat_warning, unread_share
from bigmodel.data.plan.lanes import mixed_shards
from bigmodel.data.plan.order import Order
from tests.support.memory_store import MemoryStore, lognormal_lengths


def settings_of(lanes: int, batch: int, **data: Any) -> Settings:
    data = {"lanes": lanes, "max_document_length": 512, "sequence_length": 512, "packing_buffer": 20} | data
    return Settings.model_validate({"data": data, "training": {"global_batch_size": batch}})


def store_of(**documents: list[int]) -> MemoryStore:
    """Sources with these numbers of documents in their shards; they fill packed sequences well."""
    return MemoryStore(
        {
            name: [[2 + length % 150 for length in lognormal_lengths(seed, count)] for seed, count in enumerate(counts)]
            for name, counts in documents.items()
        }
    )


def given_to_the_end(store: MemoryStore, settings: Settings) -> float:
    """The share of positions in the steps that an order gives before it ends."""
    order = Order.of_run(store, settings)
    with pytest.raises(UserError, match=r"data\.max_epochs: lane \d has no packed sequence left"):
        deque(iter(order.next_step, None), maxlen=0)
    progress = order.progress()
    in_all = sum(epochs * order.plan.source_positions[name] for name, epochs in settings.data.max_epochs.items())
    return sum(source.positions for source in progress.values()) / in_all


@pytest.mark.parametrize(
    ("sources", "lanes", "changes", "low", "high"),
    [
        ({"web": [200] * 5}, 4, {"max_epochs": {"web": 1}}, 0.15, 0.33),
        ({"web": [200] * 5}, 2, {"max_epochs": {"web": 1}}, 0.1, 0.2),
        ({"web": [200] * 6}, 4, {"max_epochs": {"web": 2}}, 0.2, 0.35),
        ({"web": [200] * 4}, 4, {"max_epochs": {"web": 1}}, 0.0, 0.06),
        ({"web": [200] * 5, "code": [90] * 3}, 2, {"max_epochs": {"web": 1, "code": 3}}, 0.02, 0.2),
        (
            {"web": [200] * 5, "code": [90] * 3},
            2,
            {"max_epochs": {"web": 1, "code": 1}, "mix": {"web": 0.5, "code": 0.5}},
            0.02,
            0.3,
        ),
    ],
)
def test_the_share_out_of_reach_is_what_an_order_leaves(
    sources: dict, lanes: int, changes: dict, low: float, high: float
) -> None:
    store, settings = store_of(**sources), settings_of(lanes, 4, **changes)
    share = unread_share(settings.data, mixed_shards(store, settings.data))
    assert low <= share <= high
    assert 1 - given_to_the_end(store, settings) == pytest.approx(share, abs=0.01)
    assert (f"{share:.1%} of the data cannot be reached" in lane_warning(store, settings)) == (share >= 0.01)


def test_the_number_of_lanes_in_the_warning_leaves_next_to_nothing() -> None:
    store, settings = store_of(web=[2000] * 5), settings_of(4, 20, max_epochs={"web": 1})
    warning = lane_warning(store, settings)
    found = re.search(r"set data\.lanes = (\d+) \((.*?)%\), or prepare again", warning)
    assert found
    better = settings_of(int(found[1]), 20, max_epochs={"web": 1})
    assert 1 - given_to_the_end(store, better) == pytest.approx(float(found[2]) / 100, abs=0.01)
    assert lane_warning(store, better) == ""


def test_endless_data_is_never_out_of_reach_but_its_uneven_repetition_is_shown() -> None:
    store, settings = store_of(web=[200] * 5, code=[90] * 4), settings_of(4, 4, max_epochs={"code": 2})
    assert lane_warning(store, settings) == ""
    warning = repeat_warning(store, settings)
    share = unread_share(
        settings_of(4, 4, max_epochs={"web": 1}).data, {"web": mixed_shards(store, settings.data)["web"]}
    )
    assert "the lanes repeat source 'web' unevenly" in warning
    assert f"{share:.1%} of the source has not been read" in warning
    assert repeat_warning(store, settings_of(1, 4)) == ""
