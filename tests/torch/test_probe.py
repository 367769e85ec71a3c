"""What ``report`` and ``apply`` say of a model is what happens, and asking changes nothing."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import rotormlx.torch as rt
from rotormlx.config import RotorConfig
from tests.support import torch_zoo
from tests.support.torch_models import CACHE, build, tokens

K8V8 = RotorConfig(8, 8, sink=2, window=8)


def generate(model, ids, **more):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **more
    )


# ---- what is refused ----------------------------------------------------------------------------

# Types whose configuration looks like any other's, and what their attention does to the keys.
REFUSED = {
    "diffllama": "torch.chunk on them",
    "doge": ".transpose on them",
    "jetmoe": ".repeat on them",
    "bigbird_pegasus": "Attention) is not causal without a mask",
    "minimax": "generate makes no cache for it",
    "gemma2": "passes softcap to its attention (Gemma2Attention)",
    "seq2seq/t5": "passes position_bias to its attention (T5Attention)",
    "speech/whisper": "its generate reads keys and values",
    "gpt_neo": "does not support set_attn_implementation",
    "rwkv": "its forward has no parameter cache or past_key_values",
    "mistral": "head_dim must be a multiple of 8",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_would_crash_or_differ_is_refused(model_type, monkeypatch):
    if model_type == "mistral":
        monkeypatch.setitem(
            torch_zoo.OVERRIDES, "mistral", {"sliding_window": None, "head_dim": 12}
        )
    model = torch_zoo.build(model_type)
    before = attentions(model)
    with pytest.raises(
        ValueError, match=r"^\[apply\] [^\n]+; use the model without rotormlx\.$"
    ) as e:
        rt.apply(model)
    assert REFUSED[model_type] in str(e.value)
    assert attentions(model) == before
    assert "_prepare_cache_for_generation" not in vars(model)


def attentions(model):
    """The attention function of every configuration in a model."""
    parts = [module.config for module in model.modules() if hasattr(module, "config")]
    return [part._attn_implementation for part in parts]


def layers_of(model):
    return model.model.layers


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (
            lambda keys, values: (keys * 2, values),
            "keys of layer 0 must be passed to attention unchanged, but the model uses mul on",
        ),
        (
            lambda keys, values: (torch.cat([keys, keys], 2)[:, :, ::2], values),
            "uses torch.cat on them",
        ),
        (lambda keys, values: (keys[:, :, :], values), "uses indexing on them"),
        (lambda keys, values: (keys.clone(), values), r"uses \.clone on them"),
        (
            lambda keys, values: (values, values),
            "must come with the values of their own layer, but the model mixes them",
        ),
    ],
)
def test_a_patched_model_is_judged_as_it_is(use, said, monkeypatch):
    """Whatever happens between cache and attention is seen, not guessed from the configuration."""
    update = DynamicCache.update
    model = build("llama")

    def changed(self, *args, **kwargs):
        return use(*update(self, *args, **kwargs))

    monkeypatch.setattr(DynamicCache, "update", changed)
    with pytest.raises(ValueError, match=said):
        rt.apply(model)


def test_a_cache_that_is_read_is_seen():
    model = build("llama")
    second = layers_of(model)[1].self_attn
    forward = second.forward

    def reads(*args, **kwargs):
        output = forward(*args, **kwargs)
        assert kwargs[CACHE].layers[1].keys.shape[1] == 2
        return output

    second.forward = reads
    with pytest.raises(ValueError, match="keys of layer 1 were read as a tensor, but they are"):
        rt.apply(model)


def test_an_attention_of_its_own_is_seen():
    """Keys that never reach the registered attention function."""
    model = build("llama")
    first = layers_of(model)[0].self_attn

    def ignores(hidden_states, **kwargs):
        states = hidden_states.new_zeros(1, 2, hidden_states.shape[1], 32)
        kwargs[CACHE].update(states, states, 0)
        return hidden_states, None

    first.forward = ignores
    layers_of(model)[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(
        ValueError, match="keys of the previous step never reached attention in layer 0"
    ):
        rt.apply(model)


# ---- what is compressed -------------------------------------------------------------------------


def test_each_layer_has_its_own_dimensions():
    """Gemma 4: full attention has another head_dim and other KV heads than sliding windows."""
    model, ids = torch_zoo.build("gemma4_text"), torch_zoo.tokens(200)
    report = rt.report(model, K8V8)
    assert [layer.compressed for layer in report.layers] == [False, False, False, True]
    exact = cache_of(model, ids)
    for layer in report.layers:
        keys = exact.layers[layer.index].keys
        assert (layer.kv_heads, layer.head_dim_k) == (keys.shape[1], keys.shape[3])
    assert len({layer.head_dim_k for layer in report.layers}) == 2
    expected = generate(model, ids)
    rt.apply(model, K8V8)
    out = generate(model, ids, return_dict_in_generate=True)
    assert getattr(out, CACHE).packed_tokens == 192
    assert torch.equal(out.sequences, expected)


@torch.no_grad()
def cache_of(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE: cache})
    return cache


def test_another_path_for_a_single_token_is_seen():
    """As of kernels for decoding: a prompt goes through attention, the next token does not."""
    model = build("llama")
    first = layers_of(model)[0].self_attn
    forward = first.forward

    def decodes_itself(hidden_states, **kwargs):
        if hidden_states.shape[1] > 1:
            return forward(hidden_states=hidden_states, **kwargs)
        states = hidden_states.new_zeros(1, 2, 1, 32)
        kwargs[CACHE].update(states, states, 0)
        return hidden_states, None

    first.forward = decodes_itself
    with pytest.raises(ValueError, match="layer 0 updates its cache, but does not call"):
        rt.apply(model)


def test_an_exact_layer_that_asks_for_too_much_is_seen():
    """Attention-sink logits need rotormlx's attention, which does not support capped scores."""
    model = build("gpt-oss")
    sliding = layers_of(model)[0].self_attn
    forward = sliding.forward
    sliding.forward = lambda *args, **kwargs: forward(*args, softcap=30.0, **kwargs)
    with pytest.raises(ValueError, match=r"passes softcap to its attention \(GptOssAttention\)"):
        rt.apply(model)


def test_a_layer_that_is_never_used_is_left_alone():
    model = build("llama")
    layers_of(model)[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    report = rt.apply(model, K8V8)
    assert [layer.compressed for layer in report.layers] == [True, False]
    assert "no token of the text passed through it" in str(report.layers[1])
    out = generate(model, tokens(150), return_dict_in_generate=True)
    assert [type(x).__name__ for x in getattr(out, CACHE).layers] == ["RotorLayer", "DynamicLayer"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, ids = build("llama").to(dtype), tokens(150)
    report = rt.apply(model, K8V8)
    assert [layer.exact_bytes for layer in report.layers] == [2, 2]
    out = generate(model, ids, return_dict_in_generate=True)
    assert getattr(out, CACHE).packed_tokens == 128
    assert getattr(out, CACHE).layers[0].stores[0].exact.dtype == dtype


# ---- asking changes nothing ---------------------------------------------------------------------


class Restless(torch.nn.Module):
    """Changes, as it runs, whatever a module can change."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.drop = torch.nn.Dropout(0.5)
        self.register_buffer("in_place", torch.zeros(3), persistent=False)
        self.register_buffer("bound_anew", torch.zeros(3))
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        self.last = x
        self.in_place += torch.rand(3)
        self.bound_anew = self.bound_anew + 1
        return self.drop(self.inner(x))


def state(model):
    """All that a run may change, by value, and what must stay the same object."""
    attributes = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | torch.Tensor)
    }
    tensors = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    objects = [id(x) for x in (*model.parameters(), *model.buffers(), *model.modules())]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    return attributes, tensors, objects, hooks, torch.get_rng_state()


@pytest.mark.parametrize("refused", [False, True])
def test_a_model_is_as_before(refused):
    model = build("llama", attention_dropout=0.2)
    first, second = layers_of(model)
    first.mlp, second.mlp = Restless(first.mlp), Restless(second.mlp)
    model.train()
    second.eval()
    seen = []
    second.register_forward_hook(lambda *_: seen.append(1))
    if refused:
        second.self_attn.forward = lambda **kwargs: 1 / 0
    before, attention = state(model), attentions(model)
    if refused:
        with pytest.raises(ValueError, match=r"run on a few tokens fails \(ZeroDivisionError"):
            rt.report(model)
    else:
        rt.report(model)
        assert seen == [1, 1], "two short runs, of the model itself"
    after = state(model)
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    assert all(torch.equal(after[1][name], before[1][name]) for name in before[1])
    assert after[2:4] == before[2:4]
    assert torch.equal(after[4], before[4])
    assert attentions(model) == attention


def test_the_attention_that_pretends_is_gone_afterwards():
    model, ids = build("llama"), tokens(40)
    expected = generate(model, ids)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return torch_attention(*args, **kwargs)

    from transformers.integrations.sdpa_attention import sdpa_attention_forward as torch_attention

    AttentionInterface.register("counted", counted)
    model.set_attn_implementation("counted")
    rt.report(model)
    assert calls == []
    assert torch.equal(generate(model, ids), expected)
    assert calls
