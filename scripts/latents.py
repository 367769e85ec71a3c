"""Measure compressed latents (MLA): ``python scripts/latents.py``.

The shape is that of DeepSeek-V3: a latent of 512 and a RoPE part of 64 in 61 layers. The script
prints Markdown tables of:

- bytes per token;
- the error of attention over synthetic RMS-normed latents with independent, correlated and outlier
  channels;
- the divergence of random tiny models, because no real model with MLA is small enough here;
- the time of a decode step in one layer, exact and compressed in turn.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer
from mlx_lm.models.cache import make_prompt_cache

import rotormlx
from rotormlx.codec.format import codec
from rotormlx.codec.parts import latent_and_rope
from rotormlx.config import BITS, RotorConfig
from rotormlx.mlx.attention import attend_view
from rotormlx.mlx.cache.latent import LatentKVCache, decoded
from rotormlx.mlx.cache.single import RotorKVCache

ROOT = Path(__file__).resolve().parents[1]
LATENT, ROPE, LAYERS, HEADS = 512, 64, 61, 128
MODELS = ("deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash", "deepseek_v32")
WIDTHS = tuple(reversed(BITS))
# Weights and output of attention.
Attended = tuple[np.ndarray, np.ndarray]


def main(
    tokens: Annotated[int, typer.Option(help="Tokens in the cache of the timed layer.")] = 8192,
    runs: Annotated[int, typer.Option(help="Timed steps of each kind.")] = 5,
) -> None:
    """Print the tables."""
    bytes_per_token()
    attention_error()
    model_divergence()
    step_time(tokens, runs)


def bytes_per_token() -> None:
    """Print the bytes per token, exact and packed."""
    exact = 2 * (LATENT + ROPE)
    print(
        "| | bytes per token and layer | of which RoPE part | per token, 61 layers "
        "| 128k tokens | smaller |\n" + "|---" * 6 + "|"
    )
    large = f"{exact * LAYERS * 2**17 / 1e9:.2f} GB"
    row("bfloat16", exact, 2 * ROPE, f"{exact * LAYERS:,}", large, "")
    for bits in WIDTHS:
        latent, rope = (
            codec(part.config, dim, layer=0, role=part.role).block_bytes / 64
            for part, dim in zip(
                latent_and_rope(RotorConfig(bits, bits)), (LATENT, ROPE), strict=True
            )
        )
        size = latent + rope
        total = f"{size * LAYERS:,.0f}"
        large = f"{size * LAYERS * 2**17 / 1e9:.2f} GB"
        row(f"{bits} bits", f"{size:.0f}", f"{rope:.0f}", total, large, f"{exact / size:.2f}x")


def attention_error(tokens: int = 2048, heads: int = 64) -> None:
    """Print KL of attention weights and relative error of outputs, by kind of latents and bits."""
    print("\n| latents | " + " | ".join(f"{b} bits: KL, error" for b in WIDTHS) + " |")
    print("|---" * (1 + len(WIDTHS)) + "|")
    for kind in ("independent channels", "correlated channels", "outlier channels"):
        rng = np.random.default_rng(0)
        latents, rope = made_latents(kind, tokens, rng), made_rope(tokens, rng)
        q, q_rope = (
            spread(rng.normal(size=(heads, x.shape[1])), x, deviation=2.0) for x in (latents, rope)
        )
        exact = attention(q, q_rope, latents, rope)
        row(kind, *(f"{d[0]:.4f}, {d[1]:.3f}" for d in distances(q, q_rope, latents, rope, exact)))
    # For comparison: ordinary keys and values with the same bits and the same spread of scores.
    rng = np.random.default_rng(0)
    keys, values = (rng.normal(size=(tokens, 128)).astype(np.float32) for _ in range(2))
    q = spread(rng.normal(size=(heads, 128)), keys, deviation=2.0 * 2**0.5)
    exact = ordinary(q, keys, values)
    cells = []
    for bits in WIDTHS:
        coded = through(RotorKVCache(RotorConfig(bits, bits, sink=0, window=0)), keys, values)
        kl, error = distance(ordinary(q, *coded), exact)
        cells.append(f"{kl:.4f}, {error:.3f}")
    row("for comparison: keys and values of 128", *cells)


def distances(
    q: np.ndarray, q_rope: np.ndarray, latents: np.ndarray, rope: np.ndarray, exact: Attended
) -> Iterator[tuple[float, float]]:
    """Yield KL and error for each bit width."""
    for bits in WIDTHS:
        cache = LatentKVCache(RotorConfig(bits, bits, sink=0, window=0))
        yield distance(attention(q, q_rope, *through(cache, latents, rope)), exact)


def through(cache: RotorKVCache, *tokens: np.ndarray) -> list[np.ndarray]:
    """Return tokens as a cache decodes them."""
    cache.update_and_fetch(*(mx.array(x)[None, None] for x in tokens))
    return [np.array(decoded(view))[0, 0] for view in cache.views()]


def distance(got: Attended, want: Attended) -> tuple[float, float]:
    """Return the KL of the weights and the relative error of the output."""
    kl = (want[0] * np.log(want[0] / got[0])).sum(1).mean()
    return float(kl), float(np.linalg.norm(got[1] - want[1]) / np.linalg.norm(want[1]))


def made_latents(kind: str, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Return RMS-normed latents with a gain per channel, float32 ``[tokens, 512]``."""
    x, gain = rng.normal(size=(tokens, LATENT)), np.ones(LATENT)
    if kind != "independent channels":
        strengths = np.exp(rng.normal(0, 0.7, 96))
        x = x / 2 + rng.normal(size=(tokens, 96)) * strengths @ rng.normal(size=(96, LATENT)) / 8
        x, gain = x + 0.7 * rng.normal(size=LATENT), np.exp(rng.normal(0, 0.5, LATENT))
    if kind == "outlier channels":
        chosen = rng.choice(LATENT, 6, replace=False)
        x[:, chosen] *= 12
        x[:, chosen[:3]] += 20
    made: np.ndarray = gain * x / np.sqrt((x**2).mean(1, keepdims=True))
    return made.astype(np.float32)


def made_rope(tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Return RoPE parts that had a constant offset before RoPE, float32 ``[tokens, 64]``."""
    x = rng.normal(size=(tokens, ROPE // 2, 2)) + 3 * rng.normal(size=(ROPE // 2, 2))
    angle = np.arange(tokens)[:, None] * 10000.0 ** (-np.arange(ROPE // 2) * 2 / ROPE)
    turned = (x[..., 0] + 1j * x[..., 1]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], -1).reshape(tokens, ROPE).astype(np.float32)


def spread(q: np.ndarray, keys: np.ndarray, deviation: float) -> np.ndarray:
    """Scale queries so that their scores over these keys have this standard deviation."""
    scaled: np.ndarray = q * deviation / np.std(q @ keys.T, axis=1, keepdims=True)
    return scaled


def attention(q: np.ndarray, q_rope: np.ndarray, latents: np.ndarray, rope: np.ndarray) -> Attended:
    """Return absorbed attention."""
    return softmax(q @ latents.T + q_rope @ rope.T, latents)


def ordinary(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> Attended:
    """Return ordinary attention."""
    return softmax(q @ keys.T, values)


def softmax(scores: np.ndarray, values: np.ndarray) -> Attended:
    """Return the softmax of the scores, and the values weighted with it."""
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return weights, weights @ values


def model_divergence(tokens: int = 300) -> None:
    """Print KL and median relative error of logits of random tiny models, decode steps only."""
    zoo = json.loads((ROOT / "tests" / "support" / "zoo.json").read_text())
    print("\n| random model | " + " | ".join(f"{b} bits: KL, error" for b in WIDTHS) + " |")
    print("|---" * (1 + len(WIDTHS)) + "|")
    for name in MODELS:
        module = importlib.import_module(f"mlx_lm.models.{name}")
        mx.random.seed(0)
        model = module.Model(module.ModelArgs.from_dict({"model_type": name} | zoo[name]))
        ids = mx.random.randint(0, zoo[name]["vocab_size"] - 1, (1, tokens), key=mx.random.key(1))
        want = steps(model, ids, make_prompt_cache(model))
        cells = []
        for bits in WIDTHS:
            caches = rotormlx.make_prompt_cache(model, RotorConfig(bits, bits, window=0))
            got = steps(model, ids, caches)
            log_p, log_q = (x - mx.logsumexp(x, -1, keepdims=True) for x in (want, got))
            kl = (mx.exp(log_p) * (log_p - log_q)).sum(-1).mean().item()
            errors = mx.linalg.norm(got - want, axis=-1) / mx.linalg.norm(want, axis=-1)
            cells.append(f"{kl:.1e}, {np.median(np.array(errors)):.4f}")
        row(name, *cells)


def steps(model: Any, ids: mx.array, caches: list[Any], count: int = 40) -> mx.array:
    """Return the logits of ``count`` decode steps after a prompt that is read in chunks."""
    prompt = ids.shape[1] - count
    for start in range(0, prompt, 60):
        mx.eval(model(ids[:, start : min(start + 60, prompt)], cache=caches))
    logits = []
    for place in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, place : place + 1], cache=caches))
        mx.eval(logits)
    return mx.concatenate(logits, axis=1).astype(mx.float32)


def step_time(tokens: int, runs: int) -> None:
    """Print the time of absorbed attention in one decode step, exact and compressed in turn."""
    latents, rope = mx.random.normal((1, 1, tokens, LATENT)), mx.zeros((1, 1, tokens, ROPE))
    queries, pe_scores = mx.random.normal((1, HEADS, 1, LATENT)), mx.zeros((1, HEADS, 1, tokens))
    scale = LATENT**-0.5
    ways: dict[str, Callable[[], mx.array]] = {
        "exact, MLX's attention": lambda: mx.fast.scaled_dot_product_attention(
            queries, latents, latents, scale=scale, mask=pe_scores
        )
    }
    for bits in WIDTHS:
        cache = LatentKVCache(RotorConfig(bits, bits))
        cache.update_and_fetch(latents, rope)
        view, _ = cache.views()
        ways[f"{bits} bits, packed"] = lambda view=view: attend_view(  # type: ignore[misc]
            queries, view, view, scale=scale, mask=pe_scores
        )
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for name in [*ways] * runs:
        start = time.perf_counter()
        mx.eval(ways[name]())
        taken[name].append(time.perf_counter() - start)
    print(f"\n| decode step, one layer, {HEADS} heads, {tokens:,} tokens | median | least |")
    print("|---|---|---|")
    for name, seconds in taken.items():
        row(name, f"{1e3 * statistics.median(seconds):.0f} ms", f"{1e3 * min(seconds):.0f} ms")


def row(*cells: object) -> None:
    """Print one row of a table."""
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    typer.run(main)
