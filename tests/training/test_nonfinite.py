"""Who made a value that is not finite, from what all ranks saw."""

import pytest

from bigmodel.training.nonfinite import Seen, decide

SOUND = Seen(False, "", "")
HOSTS = ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("seen", "sharing", "ranks", "repeats"),
    [
        (
            [SOUND, Seen(True, "head", ""), Seen(False, "", "head"), SOUND],
            1,
            (1,),
            True,
        ),  # rank 2 computes rank 1's part
        ([SOUND, Seen(True, "head", ""), SOUND, SOUND], 1, (1,), False),
        ([SOUND, Seen(True, "", ""), SOUND, SOUND], 1, (1,), False),  # it did not come back
        ([SOUND, Seen(False, "head", ""), Seen(False, "", "head"), SOUND], 1, (1,), True),  # seen only in its gradient
        (
            [Seen(True, "head", ""), Seen(False, "", "head"), SOUND, Seen(True, "", "")],
            1,
            (3,),
            False,
        ),  # a device goes before data
        ([Seen(True, "head", ""), SOUND, Seen(False, "", "head"), SOUND], 2, (0,), True),  # two ranks share each pack
        ([SOUND, SOUND, SOUND, Seen(True, "head", "")], 1, (3,), False),
        ([SOUND] * 4, 1, (), True),  # an overflow in the sum: nobody is blamed
        ([Seen(True, "head", "head")], 1, (0,), True),
        ([SOUND, SOUND, Seen(True, "", ""), Seen(True, "", "")], 2, (2, 3), False),  # they share each pack
        ([SOUND, SOUND, SOUND, Seen(True, "", "")], 2, (2, 3), False),  # rank 2 may have made what only rank 3 saw
    ],
)
def test_a_value_is_the_datas_if_another_rank_repeats_it(seen, sharing: int, ranks: tuple, repeats: bool) -> None:
    verdict = decide(seen, HOSTS, sharing)
    assert (verdict.ranks, verdict.repeats) == (ranks, repeats)
    assert verdict.hosts == tuple(HOSTS[rank] for rank in ranks)
    assert ("bad device" in str(verdict)) == (not repeats)


@pytest.mark.parametrize("device", [None, 11])
def test_in_a_divergence_on_more_ranks_than_are_computed_again_elsewhere_no_device_is_blamed(device) -> None:
    """Twelve ranks whose part is not finite again; the first eight's went to ranks 1 to 8. A part that was not finite
    in the step alone needs no other rank."""
    seen = [Seen(True, "head", "head" if 1 <= rank <= 8 else None) for rank in range(12)]
    if device:
        seen[device] = Seen(True, "", None)
    verdict = decide(seen, [str(rank) for rank in range(12)])
    assert (verdict.ranks, verdict.repeats) == ((device or 0,), not device)
