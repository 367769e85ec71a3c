"""Every question that transformers asks of a cache or a layer has its answer here.

A method or an attribute that a new version of transformers adds fails the first tests until
somebody has decided what a compressed cache says.
"""

import copy
import pickle

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

import rotormlx.torch as rt
from rotormlx.config import RotorConfig
from rotormlx.torch.layer import RotorLayer
from tests.support.torch_models import CACHE, build, padded, tokens

CONFIG = RotorConfig(8, 8, sink=2, window=8)
AS_TRANSFORMERS = "as transformers' own"
REFUSED = "refused in a sentence"
OURS = "an answer of its own, which is tested"

CACHE_QUESTIONS = {
    **dict.fromkeys(("activate_past_recording", "is_recording_past"), AS_TRANSFORMERS),
    **dict.fromkeys(("batch_repeat_interleave", "batch_select_indices"), AS_TRANSFORMERS),
    **dict.fromkeys(("crop", "reorder_cache", "reset", "update"), AS_TRANSFORMERS),
    **dict.fromkeys(("early_initialization", "is_initialized"), AS_TRANSFORMERS),
    **dict.fromkeys(("get_seq_length", "get_mask_sizes", "get_query_offset"), AS_TRANSFORMERS),
    **dict.fromkeys(("get_max_length", "get_max_cache_shape"), AS_TRANSFORMERS),
    **dict.fromkeys(("is_compileable", "is_croppable", "is_sliding"), AS_TRANSFORMERS),
    **dict.fromkeys(("is_linear", "is_dummy", "__len__", "__repr__"), AS_TRANSFORMERS),
    **dict.fromkeys(("has_previous_state", "get_conv_state"), REFUSED),
    **dict.fromkeys(("get_recurrent_state", "update_conv_state"), REFUSED),
    **dict.fromkeys(("update_recurrent_state", "update_indexer"), REFUSED),
    **dict.fromkeys(("offload", "prefetch", "__iter__"), REFUSED),
    **dict.fromkeys(("batch_size", "max_batch_size", "max_cache_len"), OURS),
}
LAYER_QUESTIONS = {
    **dict.fromkeys(("batch_repeat_interleave", "batch_select_indices"), AS_TRANSFORMERS),
    **dict.fromkeys(("crop", "reorder_cache", "reset", "update"), AS_TRANSFORMERS),
    **dict.fromkeys(
        ("lazy_initialization", "is_initialized", "supports_early_init"), AS_TRANSFORMERS
    ),
    **dict.fromkeys(("get_seq_length", "get_mask_sizes"), AS_TRANSFORMERS),
    **dict.fromkeys(("get_max_length", "get_max_cache_shape"), AS_TRANSFORMERS),
    **dict.fromkeys(("is_compileable", "is_croppable", "is_sliding", "__repr__"), AS_TRANSFORMERS),
    **dict.fromkeys(("offload", "prefetch", "keys", "values"), REFUSED),
    "layer_type": OURS,
}
# What every object has, and what says how a class is made.
_COMMON = {*dir(object), "__weakref__", "__dict__", "__annotations__", "__abstractmethods__"}
_COMMON |= {"__module__", "__init__", "__init_subclass__", "__slots__", "__static_attributes__"}
_COMMON.add("__slotnames__")  # there once an object was copied


def questions(*kinds):
    """Public names of classes, and the protocols of Python that they answer."""
    names = set().union(*(dir(kind) for kind in kinds))
    return {n for n in names if not n.startswith("_") or (n.startswith("__") and n not in _COMMON)}


@pytest.mark.parametrize(
    ("kinds", "decided"),
    [((Cache, DynamicCache), CACHE_QUESTIONS), ((CacheLayerMixin, DynamicLayer), LAYER_QUESTIONS)],
    ids=["cache", "layer"],
)
def test_every_question_is_decided(kinds, decided):
    undecided = questions(*kinds) - set(decided)
    assert not undecided, (
        f"transformers {transformers.__version__} asks {sorted(undecided)} as well"
    )


# ---- the same answers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    model.set_attn_implementation("rotormlx")
    return model


@torch.inference_mode()
def filled(model, kind, count=100, batch=2):
    cache = (
        DynamicCache(config=model.config) if kind == "own" else rt.RotorCache(model.config, CONFIG)
    )
    if count:
        model(tokens(count, batch=batch), **{CACHE: cache})
    return cache


def answers(cache):
    names = ("is_compileable", "is_croppable", "is_sliding", "is_linear", "is_dummy")
    calls = {
        "seq": lambda: [cache.get_seq_length(i) for i in (0, 1, 7)],
        "masks": lambda: [cache.get_mask_sizes(5, i) for i in (0, 1, 7)],
        "offset": cache.get_query_offset if hasattr(cache, "get_query_offset") else int,
        "most": lambda: (cache.get_max_length(), cache.get_max_length(1), cache.get_max_length(9)),
        "recording": lambda: (cache.activate_past_recording(), cache.is_recording_past(0)),
        "len": lambda: len(cache),
        "there": lambda: (cache.is_initialized, [x.is_initialized for x in cache.layers]),
        "early": lambda: [x.supports_early_init for x in cache.layers],
    }
    return [getattr(cache, name) for name in names] + [ask() for ask in calls.values()]


CHANGES = {
    "none": lambda cache: None,
    "crop": lambda cache: cache.crop(-30),
    "crop nothing": lambda cache: cache.crop(0),
    "crop all": lambda cache: cache.crop(-500),
    "reset": lambda cache: cache.reset(),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "select of a list": lambda cache: cache.batch_select_indices([0, -1, 1]),
    "select by truth": lambda cache: cache.batch_select_indices(torch.tensor([False, True])),
    "select a part": lambda cache: cache.batch_select_indices(slice(1, None)),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "copy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("count", [100, 0])
def test_answers_are_those_of_transformers(model, change, count):
    """Before anything is stored and after, and after every change; and text goes on alike."""
    caches = [filled(model, kind, count) for kind in ("own", "rotor")]
    caches = [CHANGES[change](cache) or cache for cache in caches]
    assert answers(caches[0]) == answers(caches[1])
    own = caches[0].layers[0].keys
    batch = 2 if own is None else len(own)
    results = []
    for cache in caches:
        with torch.inference_mode():
            results.append(model(tokens(5, 7, batch=batch), **{CACHE: cache}).logits)
    assert answers(caches[0]) == answers(caches[1])
    # 8 bits are off by 0.9 %; layers add up.
    assert (results[0] - results[1]).norm() < 0.05 * results[0].norm()


def test_rows_that_are_not_there_are_refused(model):
    cache = filled(model, "rotor")
    for indices in ([2], torch.tensor([-3])):
        with pytest.raises(IndexError):
            cache.batch_select_indices(indices)
    assert cache.batch_size == 2


def test_buffers_may_be_made_early(model):
    facts = (2, 2, 32, torch.float32, torch.device("cpu"))
    caches = [filled(model, kind, 0) for kind in ("own", "rotor")]
    for cache in caches:
        cache.early_initialization(*facts)
        assert cache.is_initialized
    assert answers(caches[0]) == answers(caches[1])
    with torch.inference_mode():
        # Another batch than was announced, as transformers' own allows.
        found = model(tokens(30, batch=3), **{CACHE: caches[1]}).logits
        fresh = model(tokens(30, batch=3), **{CACHE: filled(model, "rotor", 0)}).logits
    assert torch.equal(found, fresh)


def test_batch_size_is_known_while_something_is_stored(model):
    cache = filled(model, "rotor", 0)
    assert cache.batch_size == -1
    model(tokens(5, batch=2), **{CACHE: cache})
    assert cache.batch_size == 2
    cache.reset()
    assert cache.batch_size == -1
    assert repr(cache) == "RotorCache(layers=[RotorLayer, RotorLayer])"


def test_what_cannot_be_answered_is_refused(model):
    cache = filled(model, "rotor")
    layer = cache.layers[1]
    state = torch.ones(1, 2, 3)
    for ask in (
        lambda: layer.keys,
        lambda: layer.values,
        layer.offload,
        layer.prefetch,
        lambda: cache.offload(0),
        lambda: cache.prefetch(0),
        lambda: list(cache),
        lambda: DynamicCache(cache),
        cache.has_previous_state,
        lambda: cache.get_conv_state(0),
        lambda: cache.get_recurrent_state(0),
        lambda: cache.update_conv_state(state, 0),
        lambda: cache.update_recurrent_state(state, 0),
        lambda: cache.update_indexer(state, 0),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]+[.!]$"):
            ask()
    assert filled(model, "rotor", 0).layers[0].keys is None


def test_an_export_is_refused(model):
    with pytest.raises(Exception, match="RotorCache"):
        torch.export.export(model, (), {"input_ids": tokens(5), CACHE: filled(model, "rotor", 0)})


# ---- as transformers tests its own --------------------------------------------------------------


def text(model, ids, cache=None, count=8, **options):
    options = {**options, CACHE: cache, "max_new_tokens": count}
    return model.generate(input_ids=ids, **options)


def exact_text(model, ids, **options):
    return text(model, ids, DynamicCache(config=model.config), **options)


def test_a_prefilled_cache_serves_several_texts(model):
    prompt = tokens(120)
    cache = filled(model, "rotor", 0)
    with torch.inference_mode():
        model(prompt, **{CACHE: cache})
    for seed in (3, 4):
        whole = torch.cat([prompt, tokens(9, seed)], dim=1)
        assert torch.equal(text(model, whole, copy.deepcopy(cache)), exact_text(model, whole))
    assert cache.get_seq_length() == 120


def test_a_text_goes_on_from_its_cache(model):
    """The same cache passed twice."""
    cache, ids = filled(model, "rotor", 0), tokens(100)
    half = text(model, ids, cache, count=6)
    assert torch.equal(text(model, half, cache, count=6), exact_text(model, ids, count=12))


def test_a_cropped_cache_goes_on(model):
    cache, ids = filled(model, "rotor", 0), tokens(100)
    text(model, ids, cache, count=6)
    cache.crop(100 - 1 - cache.get_seq_length())
    assert torch.equal(text(model, ids, cache), exact_text(model, ids))


def test_beams_and_repeated_rows(model):
    _, batch = padded([90, 40])
    options = {"attention_mask": batch["attention_mask"], "num_beams": 2, "num_return_sequences": 2}
    found = text(model, batch["input_ids"], filled(model, "rotor", 0), **options)
    assert torch.equal(found, exact_text(model, batch["input_ids"], **options))


def test_steps_outside_of_generate(model):
    """Greedy by hand, with a graph of gradients nobody asks for."""
    ids, cache = tokens(100), filled(model, "rotor", 0)
    part, out = ids, ids
    for _ in range(8):
        part = model(part, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        out = torch.cat([out, part], dim=1)
    assert torch.equal(out, exact_text(model, ids))


def test_a_handle_refuses_every_use():
    layer = RotorLayer(CONFIG, 0)
    x = torch.ones(1, 2, 5, 32)
    key, value = layer.update(x, x)
    for use in (
        lambda: torch.cat([x, key]),
        lambda: torch.stack((key, value)),
        lambda: torch.cat(tensors=[x, key], dim=2),
        lambda: torch.einsum("bhld,bhsd->bhls", [x, key]),
        lambda: key + 1,
        lambda: 2 * key,
        lambda: x @ key,
        lambda: -key,
        lambda: not key,
        lambda: float(key),
        lambda: key == value,
        lambda: list(key),
        lambda: key[..., None],
        lambda: key.__setitem__(0, x),
        lambda: key.float,
    ):
        with pytest.raises(
            ValueError,
            match=r"layer 0 must be passed to attention unchanged, but the model uses .*first\.$",
        ):
            use()
    assert (key.dim(), key.numel(), len(key), key.requires_grad) == (4, 320, 1, False)
    assert {key: 1}[key] == 1
