"""Counts of a sequence against the rules of docs/FORMAT.md, section 8, taken token by token."""

import itertools

import numpy as np
import pytest

from rotormlx.codec import limits
from rotormlx.codec.counts import Counts, are_possible, least_size, max_blocks
from rotormlx.codec.format import BLOCK
from rotormlx.config import RotorConfig
from rotormlx.report import packed_tokens
from tests.support.sequences import DIMS, K, Sequence

CONFIG = RotorConfig(sink=3, window=10)


def fill(counts, tokens, limit=None):
    """Append tokens and pack what is to be packed."""
    counts.tokens += tokens
    while count := counts.packable(CONFIG, limit):
        counts.add_packed(count, limit)
    return counts


def numbers(counts):
    return counts.tokens, counts.packed, counts.evicted


@pytest.mark.parametrize("limit", [None, 1, 3])
def test_counts_follow_the_rules_of_a_plain_list(limit):
    """Appended and trimmed at random: the same numbers, and the same token in every place."""
    rng = np.random.default_rng(0)
    counts, model = Counts(), Sequence(CONFIG, limit)
    seen_evicted = seen_begun = 0
    for _ in range(600):
        n = int(rng.choice([1, 2, 40, 90, 200]))
        if rng.random() < 0.4:
            assert counts.trim(n, CONFIG) == model.trim(n)
        else:
            fill(counts, n, limit)
            model.append([np.zeros((K, n, d), np.float32) for d in DIMS])
        assert numbers(counts) == (model.tokens, model.packed, model.evicted)
        assert counts.positions(CONFIG).tolist() == [*itertools.chain(*model.positions())]
        assert are_possible(np.array([numbers(counts)]), CONFIG, limit).all()
        seen_evicted += counts.evicted > 0
        seen_begun += counts.packed % BLOCK > 0
        if model.vectors[0].shape[1] > 2000:
            counts, model = Counts(), Sequence(CONFIG, limit)
    assert seen_evicted > 100 if limit else seen_begun > 30  # the cases that are easily wrong came


def test_read_again_a_trimmed_sequence_counts_as_if_no_more_had_come():
    rng = np.random.default_rng(1)
    again = []
    for length in rng.integers(1, 500, 300):
        counts = fill(Counts(), int(length))
        for _ in range(rng.integers(1, 4)):
            counts.trim(int(rng.integers(0, 200)), CONFIG)
        never = numbers(fill(Counts(), counts.tokens))
        again.append(counts.tokens_to_reread(CONFIG))
        counts.trim(again[-1], CONFIG)
        assert numbers(fill(counts, again[-1])) == never
    # No more than the window and a begun block; and both cases came often.
    assert max(again) < CONFIG.window + BLOCK
    assert 50 < again.count(0) < 250


def test_a_call_packs_no_further_than_the_last_slot():
    counts = Counts(tokens=CONFIG.sink + CONFIG.window + 10 * BLOCK)
    assert counts.packable(CONFIG) == 10 * BLOCK
    assert counts.packable(CONFIG, 4) == 4 * BLOCK
    counts.add_packed(3 * BLOCK, 4)
    assert (counts.next_slot(4), counts.packable(CONFIG, 4)) == (3, BLOCK)
    counts.add_packed(BLOCK, 4)
    assert (counts.next_slot(4), counts.packable(CONFIG, 4)) == (0, 4 * BLOCK)


def test_a_call_packs_no_more_than_kernels_can_count(monkeypatch):
    monkeypatch.setattr(limits, "MOST_ENCODED", 2 * BLOCK)
    assert Counts(tokens=10 * BLOCK).packable(CONFIG) == 2 * BLOCK


@pytest.mark.parametrize("tokens", [0, 1, 76, 77, 140, 141, 1000])
def test_the_report_packs_what_a_cache_packs(tokens):
    assert packed_tokens(tokens, CONFIG) == fill(Counts(), tokens).packed


def test_blocks_after_are_those_that_packing_makes():
    for before, trimmed, more in itertools.product((0, 90, 400), (0, 30, 200), (1, 70, 300)):
        counts = fill(Counts(), before)
        counts.trim(trimmed, CONFIG)
        foreseen = counts.blocks_after(more, CONFIG)
        assert foreseen == fill(counts, more).packed // BLOCK


def test_the_smallest_limit_holds_one_block():
    least = least_size(CONFIG)
    assert least == CONFIG.sink + CONFIG.window + 127
    assert [max_blocks(n, CONFIG) for n in (None, least, least + 63, least + 64)] == [None, 1, 1, 2]
    with pytest.raises(ValueError, match=f"must be at least {least} .* {least - 1} was given"):
        max_blocks(least - 1, CONFIG)


# tokens, packed, evicted; most blocks; whether a sequence can have them
POSSIBLE = [
    ((0, 0, 0), None, True),
    ((2, 0, 0), None, True),
    ((67, 64, 0), None, True),
    ((66, 64, 0), None, False),  # packed, but no whole sink
    ((-1, 0, 0), None, False),
    ((200, 64, 64), None, False),  # evicted without a limit
    ((200, 128, 64), 2, True),
    ((200, 64, 64), 2, False),  # evicted before the ring was full
    ((200, 128, 63), 2, False),  # evicted half a block
    ((300, 192, 0), 2, False),  # more than the ring holds
]


@pytest.mark.parametrize(("row", "limit", "possible"), POSSIBLE)
def test_counts_that_no_sequence_has_are_told(row, limit, possible):
    others = np.array([[0, 0, 0], row, [2, 0, 0]], np.int32)
    assert are_possible(others, CONFIG, limit).tolist() == [True, possible, True]
