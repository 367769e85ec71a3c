"""Models that transformers spreads over ranks: the text of one rank, and the bytes of its heads."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rotormlx.torch.fingerprint import fingerprint
from tests.support import two_ranks
from tests.support.both_hosts import by_torch, calibration
from tests.support.torch_models import build

pytest.importorskip("accelerate", reason="needs accelerate, which tp_plan asks for")
pytestmark = pytest.mark.slow

CLONE = Path(__file__).resolve().parents[2]


def run(output, ranks, chosen):
    """What each rank has found with each setting; they talk over localhost."""
    output.mkdir()
    command = [sys.executable, two_ranks.__file__, str(output), *chosen]
    places = os.pathsep.join([str(CLONE), os.environ.get("PYTHONPATH", "")])
    own = os.environ | {"PYTHONPATH": places, "CUDA_VISIBLE_DEVICES": ""}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        own |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(
            subprocess.Popen(command, env=own | names, stderr=subprocess.PIPE, text=True)
        )
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [
        [torch.load(output / f"{number}-{rank}.pt") for number in range(len(chosen))]
        for rank in range(ranks)
    ]


def heads(array, rank):
    """The KV heads of one of two ranks; those of a channel scale ``[K, D]`` stand first."""
    return None if array is None else array.chunk(2, dim=int(array.ndim > 2))[rank]


SETTINGS = [(8, None), (4, None), (4, "scale"), (4, "klt")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one rank that is alone and each of two ranks have found, and where they saved.

    A process takes seconds to start, so each meets all settings; two ranks also meet a model whose
    heads they do not divide.
    """
    output = tmp_path_factory.mktemp("ranks")
    model, one_head = output / "model", output / "one_head"
    build("llama").save_pretrained(model)
    build("llama", num_key_value_heads=1).save_pretrained(one_head)
    chosen = []
    for bits, transform in SETTINGS:
        chosen.append(f"{model}:{bits}")
        if transform:
            facts = {"heads": 2, "dims": (32, 32), "losses": [(1.0, 1e-2), (2e-2, 1e-4)]}
            made = calibration(transform, fingerprint(by_torch(model)), **facts)
            made.save(output / transform)
            chosen[-1] += f":{output / transform}"
    [alone] = run(output / "alone", 1, chosen)
    return alone, run(output / "spread", 2, [*chosen, f"{one_head}:4"]), output


@pytest.fixture(params=range(len(SETTINGS)), ids=[str(setting) for setting in SETTINGS])
def ranks(found, request):
    """What two ranks have found with a setting, and what one that is alone has."""
    alone, spread, _ = found
    return [of_rank[request.param] for of_rank in spread], alone[request.param]


def test_two_ranks_of_half_the_heads_give_the_text_of_one(ranks):
    ranks, alone = ranks
    assert alone["report"] == [2, 2]
    assert len(set(alone["tokens"][two_ranks.PROMPT_TOKENS :])) > 3
    for rank, found in enumerate(ranks):
        assert found["tokens"] == alone["tokens"]
        assert found["report"] == [1, 1]
        # What the first layer gets is the same to the bit; behind it, sums of ranks are rounded
        # in another order.
        for own, whole in zip(found["packed"][0], alone["packed"][0], strict=True):
            for array, arrays in zip(own, whole, strict=True):
                wanted = heads(arrays, rank)
                assert (array is None) == (wanted is None)
                assert array is None or torch.equal(array, wanted)
    assert not torch.equal(ranks[0]["packed"][0][0][0], ranks[1]["packed"][0][0][0])


def test_a_calibration_is_that_of_the_own_heads(ranks):
    ranks, alone = ranks
    for found, heads_here in ((alone, 2), *((rank, 1) for rank in ranks)):
        assert found["refusal"] == ""
        if "heads" in found:
            assert found["heads"] == {heads_here}
            assert found["loaded"] == ""


def test_the_fingerprint_is_that_of_the_whole_model(ranks):
    ranks, alone = ranks
    assert {found["fingerprint"] for found in ranks} == {alone["fingerprint"]}


def test_a_part_of_a_cache_has_no_file(found, ranks):
    output = found[2]
    ranks, alone = ranks
    for name in ("save", "load"):
        assert "is spread over" not in alone[name]
        for found in ranks:
            assert "LlamaForCausalLM is spread over 2 ranks" in found[name], name
    files = {path.name for path in (output / "alone").glob("*.safetensors")}
    assert files == {f"{number}-0.safetensors" for number in range(len(SETTINGS))}
    assert not [*(output / "spread").glob("*.safetensors")]


def test_ranks_that_do_not_divide_the_heads_are_refused(found):
    for of_rank in found[1]:
        refusal = of_rank[-1]["refusal"]
        assert "must divide the 1 KV heads of LlamaForCausalLM, but there are 2" in refusal
