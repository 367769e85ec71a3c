"""SmolLM2-135M through transformers and RotorCache: the quality that the project promises.

The text goes through in chunks of 64 tokens, so a chunk attends to itself and to at most 131 tokens
more (sink and tail) exactly, and to everything else as packed bytes.
"""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaForCausalLM
from transformers.utils import logging

import rotormlx
import rotormlx.torch as rt
from rotormlx.codec.format import BLOCK
from rotormlx.config import RotorConfig
from rotormlx.measure import scoring
from rotormlx.measure.text import default_text
from tests.support.torch_models import CACHE

CHUNK = 64
# Before it, nothing is packed: two chunks and a block must be read.
FIRST, PREDICTIONS = 192, 512


@pytest.fixture(scope="module")
def model(smollm2_path):
    logging.disable_progress_bar()
    loaded = LlamaForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    assert rt.report(loaded).summary == (
        "llama: 30 of 30 caches compressed, K4 V4 cascade, 4.375 bits per value"
    )
    loaded.set_attn_implementation("rotormlx")  # reads exact caches too, for comparison
    return loaded


@pytest.fixture(scope="module")
def text(smollm2_path):
    tokenizer = Tokenizer.from_file(str(smollm2_path / "tokenizer.json"))
    return tokenizer.encode(default_text()[:8000]).ids


@torch.inference_mode()
def score(model, tokens, cache):
    """As ``scoring.score``, of a model and a cache of transformers."""
    predictions = len(tokens) - 1
    packed, rows = np.zeros(predictions, np.int64), []
    for start in range(0, predictions, CHUNK):
        stop = min(start + CHUNK, predictions)
        # Counted before the call: what the chunk itself adds may be read exact or packed.
        packed[start:stop] = getattr(cache, "packed_tokens", 0)
        ids = torch.tensor([tokens[start:stop]])
        logits = model(ids, **{CACHE: cache}).logits[0]
        rows.append(torch.log_softmax(logits.float(), -1).numpy())
    return scoring.Scores(np.concatenate(rows), np.asarray(tokens[1:], np.int64), packed)


@pytest.fixture(scope="module")
def exact(model, text):
    tokens = text[: FIRST + PREDICTIONS + 1]
    return score(model, tokens, DynamicCache(config=model.config))


def test_divergence_is_small(model, text, exact, figure):
    """The bound of the project, read from packed bytes."""
    cache = rt.RotorCache(model.config)
    scores = score(model, text[: FIRST + PREDICTIONS + 1], cache)
    # Every prediction compared read at least a block of packed tokens, the last ones most.
    assert scores.packed_tokens[FIRST:].min() >= BLOCK
    assert scores.packed_tokens[-1] >= FIRST + PREDICTIONS - 4 * CHUNK
    found = scoring.compare(exact, scores, start=FIRST)
    figure(
        f"torch, rotormlx 4 bit: KL {found.kl_mean:.4f}, top-1 {found.top1:.1%}, perplexity "
        f"{found.ppl:.2f} (exact {exact.perplexity(FIRST):.2f}), {PREDICTIONS} predictions"
    )
    assert found.kl_mean <= 0.020
    # An exact path would give nothing.
    assert found.kl_mean > 1e-5


def test_a_calibration_of_mlx_lowers_the_divergence(model, smollm2, text, exact, tmp_path, figure):
    """Of channel scales, on other text; docs/CALIBRATION.md has what MLX gains."""
    rotormlx.calibrate(*smollm2).save(tmp_path / "c.safetensors")
    calibration = rt.load_calibration(tmp_path / "c.safetensors", model)
    tokens, found = text[: FIRST + PREDICTIONS + 1], []
    plain = RotorConfig(channel_scale="none")
    for given in ((plain, None), (None, calibration)):
        cache = rt.RotorCache(model.config, given[0], calibration=given[1])
        found.append(scoring.compare(exact, score(model, tokens, cache), start=FIRST).kl_mean)
    figure(f"torch, a calibration of MLX: KL {found[0]:.5f} without, {found[1]:.5f} with it")
    assert found[1] < 0.9 * found[0]


def test_a_padded_batch_is_its_rows(model, text):
    """Four prompts of other lengths generate what each generates alone, read from packed bytes."""
    config = RotorConfig(8, 8, window=0)
    prompts = [
        torch.tensor([text[s : s + n]]) for s, n in ((0, 90), (200, 75), (300, 70), (400, 9))
    ]
    ids = torch.cat([torch.nn.functional.pad(p, (90 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(p), (90 - p.shape[1], 0)) for p in prompts]
    )

    def generate(ids, **more):
        cache = rt.RotorCache(model.config, config)
        out = model.generate(ids, **{CACHE: cache}, max_new_tokens=6, do_sample=False, **more)
        return out[:, ids.shape[1] :], cache.rotor_layers[-1].packed

    together, packed = generate(ids, attention_mask=mask)
    assert packed == [64, 64, 64, 0]
    for row, prompt in enumerate(prompts):
        alone, _ = generate(prompt)
        assert together[row].tolist() == alone[0].tolist()
