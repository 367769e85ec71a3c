"""The prompt caches that a server uses again: as exact as those of a prompt that comes alone."""

import mlx.core as mx
import mlx_lm.server
import pytest
from mlx_lm.models.cache import make_prompt_cache

from rotormlx.cli import serving
from rotormlx.config import RotorConfig
from rotormlx.mlx import integration
from tests.support import models as tiny

COARSE = RotorConfig(2, 2)
SHARED, NEW, LONG = 300, 20, 500
# Behind it the prompt that came before had everything packed: 4 of the sink and 3 blocks are kept.
EXACT_FROM = 4 + 3 * 64


@pytest.fixture
def prompts():
    """The store of prompt caches as the server makes it."""
    with serving.measured(mlx_lm.server, lambda: []):
        yield mlx_lm.server.LRUPromptCache(10)


def read(model, tokens, caches):
    model(mx.array(tokens)[None], cache=caches)
    mx.eval([cache.state for cache in caches])


def keep(prompts, model, tokens, max_kv_size=None):
    caches = make_prompt_cache(model, max_kv_size)
    read(model, tokens, caches)
    prompts.insert_cache("model", tokens, caches)


def two_prompts():
    longer = tiny.tokens(LONG)[0].tolist()
    return longer, longer[:SHARED] + tiny.tokens(NEW, seed=2)[0].tolist()


def test_a_shared_beginning_has_the_window_of_a_prompt_that_comes_alone(prompts) -> None:
    model = tiny.build("llama")
    integration.apply(model, COARSE)
    longer, tokens = two_prompts()
    alone = make_prompt_cache(model)
    read(model, tokens[:SHARED], alone)
    keep(prompts, model, longer)
    caches, rest = prompts.fetch_nearest_cache("model", tokens)
    assert (len(rest), caches[0].offset) == (len(tokens) - EXACT_FROM, EXACT_FROM)
    read(model, rest[: SHARED - EXACT_FROM], caches)
    assert [cache.counts for cache in caches] == [cache.counts for cache in alone]
    # Keys and values of the first layer depend on nothing that was packed.
    for ours, theirs in zip(caches[0].state, alone[0].state, strict=True):
        assert mx.array_equal(ours, theirs) if isinstance(ours, mx.array) else ours == theirs
    # What is kept is the whole prompt, still.
    assert prompts.fetch_nearest_cache("model", longer)[1] == longer[-1:]


def test_nothing_is_read_again_that_need_not_be(prompts) -> None:
    model = tiny.build("llama")
    integration.apply(model, COARSE)
    longer, tokens = two_prompts()
    assert prompts.fetch_nearest_cache("model", tokens) == (None, tokens)
    keep(prompts, model, longer)
    # The whole of it, its last tokens trimmed away within the tail, and more behind it.
    assert prompts.fetch_nearest_cache("model", longer)[1] == longer[-1:]
    assert prompts.fetch_nearest_cache("model", [*longer[:-2], 0])[1] == [0]
    assert prompts.fetch_nearest_cache("model", [*longer, 7, 8])[1] == [7, 8]


@pytest.mark.parametrize("place", [EXACT_FROM, SHARED - 1])
def test_an_image_is_not_cut(prompts, place: int) -> None:
    """mlx-lm writes negative numbers for its tokens, and reads it in one piece or not at all."""
    model = tiny.build("llama")
    integration.apply(model, COARSE)
    longer, tokens = two_prompts()
    caches = make_prompt_cache(model)
    read(model, longer, caches)
    longer[place] = tokens[place] = -5
    prompts.insert_cache("model", longer, caches)
    assert prompts.fetch_nearest_cache("model", tokens)[1] == tokens[SHARED:]


@pytest.mark.parametrize(("model_type", "limit"), [("falcon_h1", None), ("llama", 300)])
def test_what_cannot_be_trimmed_is_found_as_before(prompts, model_type, limit) -> None:
    model = tiny.build(model_type)
    integration.apply(model, COARSE)
    longer, tokens = two_prompts()
    keep(prompts, model, longer[:100], limit)
    keep(prompts, model, longer, limit)
    assert prompts.fetch_nearest_cache("model", tokens)[1] == tokens[100:]


@pytest.mark.parametrize(("model_type", "reused"), [("llama", 4), ("falcon_h1", None)])
def test_a_prompt_that_is_kept_whole_leaves_a_token_to_read(prompts, model_type, reused) -> None:
    """Without one mlx-lm ends generation, of all clients."""
    model = tiny.build(model_type)
    integration.apply(model, COARSE)
    for tokens in ([1, 2, 3, 4, 5], [9], [6, -5]):
        prompts.insert_cache("model", tokens, make_prompt_cache(model))
    keep(prompts, model, [1, 2, 3, 4, 5])
    caches, rest = prompts.fetch_nearest_cache("model", [1, 2, 3, 4, 5])
    assert (caches and caches[0].offset, rest) == (reused, [1, 2, 3, 4, 5][reused or 0 :])
    for whole in ([9], [6, -5]):
        assert prompts.fetch_nearest_cache("model", whole) == (None, whole)
