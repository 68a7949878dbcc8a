import numpy as np

from bigmodel.data.randomness import KEPT_STEPS, extend_key, make_key, permutation, words, words_of_keys


def test_words_are_those_of_splitmix64():
    # The published sequence for the seed 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert words(1234567, 5).tolist() == expected


def test_words_of_several_keys_are_those_of_each():
    keys = [make_key("a", number) for number in range(3)]
    assert words_of_keys(keys, 7).tolist() == [words(key, 7).tolist() for key in keys]
    longest = words(keys[0], KEPT_STEPS + 2)
    assert words(keys[0], KEPT_STEPS).tolist() == longest[:KEPT_STEPS].tolist()
    assert longest[-1] == words(keys[0] + 2 * 0x9E3779B97F4A7C15 & 2**64 - 1, KEPT_STEPS)[-1]
    assert extend_key(make_key("a", 1), 2) == make_key("a", 1, 2)


def test_keys_and_permutations_never_change():
    assert make_key("packs", 1, 2, 3) == 16024759375273980949
    assert permutation(make_key("documents", 1), 8).tolist() == [0, 5, 1, 3, 4, 6, 7, 2]


def test_every_part_of_a_key_counts_and_so_does_their_order():
    keys = {make_key("a", 1, 2), make_key("b", 1, 2), make_key("a", 2, 1), make_key("a", 1), make_key("a", 1, 2, 0)}
    assert len(keys) == 5


def test_permutation_has_every_number_once_and_mixes_evenly():
    assert sorted(permutation(5, 1000).tolist()) == list(range(1000))
    firsts = np.bincount([permutation(key, 4)[0] for key in range(4000)], minlength=4)
    assert firsts.min() > 900  # 1000 expected, 27 standard deviation


def test_words_of_neighbouring_keys_share_half_their_bits():
    differing = np.unpackbits((words(7, 4096) ^ words(8, 4096)).view(np.uint8)).mean()
    assert abs(differing - 0.5) < 0.005
