"""Layers of the torch companion under random sequences of operations, against exact vectors.

The model of a batch row is that of tests/support/sequences.py; a layer has besides its positions,
the padding before each row. After every step, each layer
that it touched, and those that are related to it, must hold just that:

- counts, positions and padding are the model's;
- sink and tail are its vectors, bit for bit;
- every packed row has the codes that the float64 reference gives its vector with the centre of its
  block, and every block that was never cut and filled up again has its own mean as its centre;
- attention over the layer is attention over those decoded and exact vectors;
- bytes are those of the format plus the room for growth;
- a view that was handed out before an append answers bit for bit as before it.

With ROTORMLX_EXAMPLES=n there are n times as many sequences, chosen at random.
"""

import copy
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import LlamaConfig, LlamaForCausalLM

import rotormlx.torch as rt
from rotormlx.codec.format import BLOCK, ROLES, Packed, codec
from rotormlx.config import RotorConfig
from rotormlx.storage.cache_fields import BATCH, SINGLE
from rotormlx.torch import ops, prompt_cache
from rotormlx.torch.layer import RotorLayer
from tests.support.bounds import examples
from tests.support.sequences import (
    DIMS,
    LONGEST,
    Held,
    K,
    Sequence,
    check_attention,
    check_held,
    queries,
)

LAYERS = 6  # alive at once
# A file holds all layers of a model; this one has a layer whose vectors may have these dimensions.
MODEL = LlamaForCausalLM(
    LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=DIMS[0],
        hidden_size=2 * DIMS[1],
        vocab_size=8,
        intermediate_size=8,
        attn_implementation="rotormlx",
    )
)


class Rows:
    """What a layer must hold."""

    def __init__(self, rows, padding):
        self.rows, self.padding = rows, padding
        self.length = 0  # positions, padding included

    def copy(self):
        twin = copy.copy(self)
        twin.rows, twin.padding = [row.copy() for row in self.rows], list(self.padding)
        return twin

    def take(self, vectors, told):
        """New tokens come, ``[batch, K, L, D]``; padding is told, or None."""
        length = vectors[0].shape[2]
        self.length += length
        for b, row in enumerate(self.rows):
            if told is not None and not row.tokens:
                self.padding[b] = min(told[b], self.length)
            new = self.length - self.padding[b] - row.tokens
            row.take([v[b, :, length - new :] for v in vectors])

    def pack(self):
        for row in self.rows:
            row.pack()

    def crop(self, n):
        self.length -= min(n, self.length)
        for b, row in enumerate(self.rows):
            row.trim(max(0, row.tokens - max(0, self.length - self.padding[b])))
            self.padding[b] = min(self.padding[b], self.length)

    def select(self, indices):
        self.rows = [self.rows[i].copy() for i in indices]
        self.padding = [self.padding[i] for i in indices]


class Layers(RuleBasedStateMachine):
    """Layers that come from each other."""

    layers = Bundle("layers")
    steps = states = 0

    @initialize(
        bits=st.sampled_from([(4, 4), (3, 8), (8, 2), (2, 3)]),
        rotation=st.sampled_from(["cascade", "rotor3"]),
        sink=st.sampled_from([0, 4]),
        window=st.sampled_from([0, 0, 16, 64]),
        dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    )
    def setup(self, bits, rotation, sink, window, dtype):
        self.config = RotorConfig(*bits, rotation, sink=sink, window=window)
        self.dtype = getattr(torch, dtype)
        self.seeds = itertools.count()
        self.alive = []

    def teardown(self):
        for layer, model in getattr(self, "alive", ()):
            self.check(layer, model)

    def vectors(self, batch, tokens):
        """Keys and values of the layer's dtype, and the same as float32."""
        rng = np.random.default_rng(next(self.seeds))
        made = [
            torch.from_numpy(rng.normal(size=(batch, K, tokens, d)) + 2).to(self.dtype)
            for d in DIMS
        ]
        return made, [a.float().numpy() for a in made]

    def added(self, layer, model):
        type(self).states += 1
        self.check(layer, model)
        self.alive.append([layer, model])
        return self.alive[-1]

    def derived(self, held, layer, model):
        """A layer that was made of another stands beside it, or in its place if there are many."""
        if len(self.alive) < LAYERS:
            return self.added(layer, model)
        type(self).states += 1
        self.check(*held)
        held[:] = layer, model
        self.check(*held)
        return multiple()

    def touched(self, layer, model):
        type(self).steps += 1
        self.check(layer, model)
        # Whoever is related must not have noticed.
        for other, its_model in self.alive[-4:]:
            self.check(other, its_model)

    def add(self, layer, model, tokens, told, *, inference=False):
        """One step, as the attention function makes it."""
        with torch.inference_mode(inference):
            new, vectors = self.vectors(len(model.rows), tokens)
            handle, _ = layer.update(*new)
            view = handle.step.read(told)
        model.take(vectors, told)
        # In the view the new tokens are still exact.
        assert view.padding == tuple(model.padding)
        for place, source in enumerate((view.keys, view.values)):
            check_held(self.held(place, source, view.lengths.tolist()), place, model.rows)
        model.pack()

    # ---- operations -----------------------------------------------------------------------------

    @precondition(lambda self: len(self.alive) < LAYERS)
    @rule(
        target=layers,
        left=st.lists(st.sampled_from([0, 0, 1, 17, 63, 130]), min_size=1, max_size=3),
        tokens=st.one_of(st.integers(1, 150), st.integers(150, 300)),
        inference=st.booleans(),
    )
    def new(self, left, tokens, inference):
        """Rows with padding at their left, perhaps nothing but padding."""
        layer = RotorLayer(self.config, 0)
        model = Rows([Sequence(self.config) for _ in left], [0] * len(left))
        self.add(layer, model, tokens, left, inference=inference)
        return self.added(layer, model)

    @rule(held=layers, tokens=st.integers(60, 150), inference=st.booleans(), data=st.data())
    def append(self, held, tokens, inference, data):
        self.appended(*held, tokens, inference, data)

    @rule(held=layers, tokens=st.integers(1, 20), inference=st.booleans(), data=st.data())
    def append_few(self, held, tokens, inference, data):
        self.appended(*held, tokens, inference, data)

    def appended(self, layer, model, tokens, inference, data):
        if max((row.tokens for row in model.rows), default=0) + tokens > LONGEST:
            tokens = 1
        told = None
        if data.draw(st.booleans()):
            # To a row that holds tokens it says nothing; to others, how many of these do not count.
            more = [data.draw(st.integers(0, tokens + 5)) for _ in model.rows]
            told = [model.length + n for n in more]
        before = self.view(layer) if all(layer.tokens) else None
        answer = None if before is None else self.attend(*before)
        self.add(layer, model, tokens, told, inference=inference)
        assert before is None or torch.equal(self.attend(*before), answer)
        self.touched(layer, model)

    @rule(
        held=layers,
        n=st.one_of(*(st.integers(0, n) for n in (20, 80, LONGEST))),
        keep=st.booleans(),
    )
    def cropped(self, held, n, keep):
        """By how many go, or by how many stay; that none stays cannot be said so."""
        layer, model = held
        if keep:
            n = max(0, min(n, model.length - 1))
        layer.crop(model.length - n if keep else -n)
        model.crop(n)
        self.touched(layer, model)

    @rule(held=layers, data=st.data(), how=st.sampled_from(["numbers", "kept", "beams", "repeat"]))
    def selected(self, held, data, how):
        layer, model = held
        count = len(model.rows)
        rows = range(count)
        if how == "repeat":
            repeats = 2 if count < 3 else 1
            layer.batch_repeat_interleave(repeats)
            model.select([b for b in rows for _ in range(repeats)])
        elif how == "kept":
            kept = data.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
            layer.batch_select_indices(torch.tensor(kept))
            model.select([b for b in rows if kept[b]])
        else:
            size = (count, count) if how == "beams" else (1, 4)
            chosen = data.draw(st.lists(st.sampled_from(rows), min_size=size[0], max_size=size[1]))
            select = layer.reorder_cache if how == "beams" else layer.batch_select_indices
            select(torch.tensor(chosen))
            model.select(chosen)
        self.touched(layer, model)

    @rule(
        target=layers, held=layers, how=st.sampled_from(["copy", "state", "file", "file", "reset"])
    )
    def another(self, held, how):
        layer, model = held
        if how in ("state", "file"):
            return self.saved_and_loaded(held, how)
        layer, model = copy.deepcopy(layer), model.copy()
        if how == "reset":
            layer.reset()
            assert (layer.get_seq_length(), layer.nbytes, layer.packed_tokens) == (0, 0, 0)
            model = Rows([Sequence(self.config) for _ in model.rows], [0] * len(model.rows))
            self.add(layer, model, 150, None)
        return self.derived(held, layer, model)

    def saved_and_loaded(self, held, how):
        layer, model = held
        if len({(p, row.packed) for p, row in zip(model.padding, model.rows, strict=True)}) > 1:
            with pytest.raises(ValueError, match="All batch rows must have one length to be saved"):
                prompt_cache.state_of(layer)
            # What the message advises; the row is one with the most packed tokens.
            layer, model = copy.deepcopy(layer), model.copy()
            packed = [row.packed for row in model.rows]
            layer.batch_select_indices(torch.tensor([packed.index(max(packed))]))
            model.select([packed.index(max(packed))])
        cache = rt.RotorCache(MODEL.config, self.config)
        if how == "file":
            cache.layers[0] = layer
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "cache.safetensors"
                rt.save_prompt_cache(path, MODEL, cache)
                cache, _ = rt.load_prompt_cache(path, MODEL)
        else:
            # Copies, as a file brings them.
            state = copy.deepcopy(prompt_cache.state_of(layer))
            name = BATCH if len(model.rows) > 1 else SINGLE
            prompt_cache._fill(cache.layers[0], name, state, torch.device("cpu"))
        model = model.copy()
        # What is saved is the rows; of which batch an empty layer was, nothing tells.
        model.length, model.padding = model.rows[0].tokens, [0] * len(model.rows)
        if not model.length:
            return multiple()
        return self.derived(held, cache.layers[0], model)

    # ---- what must hold -------------------------------------------------------------------------

    def held(self, place, source, lengths):
        chosen = codec(self.config, DIMS[place], layer=0, role=ROLES[place])
        packed, scale = source.packed, source.channel_scale
        if packed is not None:
            words, scales, centres = (None if a is None else a.numpy() for a in packed)
            packed = Packed(words.view(np.uint32), scales, centres)
        scale = None if scale is None else scale.numpy()
        lengths = [tuple(pair) for pair in lengths]
        exact = source.exact.float().numpy()
        return Held(chosen, self.config.sink, exact, packed, scale, lengths)

    def view(self, layer):
        """Lengths and sources, as attention reads them."""
        lengths = [*zip(layer.packed, layer.tokens, strict=True)]
        return torch.tensor(lengths, dtype=torch.int32), *(s.view for s in layer.stores)

    def attend(self, lengths, keys, values):
        q = torch.from_numpy(queries(len(lengths)))
        return ops.attend(q, lengths, keys, values, self.config, layer=0, scale=0.25)

    def check(self, layer, model):
        tokens = [row.tokens for row in model.rows]
        packed = [row.packed for row in model.rows]
        assert layer.get_seq_length() == model.length
        assert layer.get_mask_sizes(3) == (model.length + 3, 0)
        assert (layer.padding, layer.tokens, layer.packed) == (model.padding, tokens, packed)
        assert layer.batch_size == len(tokens)
        assert layer.packed_tokens == min(packed)
        lengths, *sources = self.view(layer)
        held = [self.held(place, source, lengths.tolist()) for place, source in enumerate(sources)]
        self.check_bytes(layer, tokens, packed)
        if all(tokens):
            found = self.attend(lengths, *sources).float().numpy()
            check_attention(found, held, model.rows, scale=0.25)
        else:
            for place, of_role in enumerate(held):
                check_held(of_role, place, model.rows)

    def check_bytes(self, layer, tokens, packed):
        blocks, total = -(-max(packed) // BLOCK), 0
        for store in layer.stores:
            exact = max(t - p for t, p in zip(tokens, packed, strict=True))
            assert exact <= store.exact.shape[2] <= self.config.sink + self.config.window + BLOCK
            total += store.exact.nbytes
            if store.packed is None:
                assert not blocks
                continue
            have = store.packed.scales.shape[2]
            assert blocks <= have <= LONGEST // BLOCK + 4
            total += len(tokens) * K * have * store.codec.block_bytes
            total += 0 if store.channel_scale is None else store.channel_scale.nbytes
        assert layer.nbytes == total


@pytest.mark.slow
def test_any_sequence_of_operations_leaves_what_the_model_foresees(figure):
    Layers.steps = Layers.states = 0
    run_state_machine_as_test(Layers, settings=examples(60, stateful_step_count=50))
    assert Layers.steps > 1000
    steps, states = f"{Layers.steps:,}", f"{Layers.states:,}"
    figure(
        f"torch state machine: {steps} changes of {states} layers, checked against exact vectors"
    )
