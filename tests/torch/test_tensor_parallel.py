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


def run(model, output, ranks, *options):
    """What each rank has found; they talk over localhost."""
    command = [sys.executable, two_ranks.__file__, str(model), str(output), *map(str, options)]
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
    return [torch.load(f"{output}-{rank}.pt") for rank in range(ranks)]


def heads(array, rank):
    """The KV heads of one of two ranks; those of a channel scale ``[K, D]`` stand first."""
    return None if array is None else array.chunk(2, dim=int(array.ndim > 2))[rank]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=[(8, None), (4, None), (4, "scale"), (4, "klt")], ids=str)
def ranks(model, tmp_path_factory, request):
    """What two ranks have found, and what one that is alone has."""
    output = tmp_path_factory.mktemp("ranks")
    bits, transform = request.param
    options = [bits]
    if transform:
        facts = {"heads": 2, "dims": (32, 32), "losses": [(1.0, 1e-2), (2e-2, 1e-4)]}
        made = calibration(transform, fingerprint(by_torch(model)), **facts)
        made.save(output / "calibration")
        options.append(output / "calibration")
    (alone,) = run(model, output / "alone", 1, *options)
    return run(model, output / "spread", 2, *options), alone, output


def test_two_ranks_of_half_the_heads_give_the_text_of_one(ranks):
    ranks, alone, _ = ranks
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
    ranks, alone, _ = ranks
    for found, heads_here in ((alone, 2), *((rank, 1) for rank in ranks)):
        assert found["refusal"] == ""
        if "heads" in found:
            assert found["heads"] == {heads_here}
            assert found["loaded"] == ""


def test_the_fingerprint_is_that_of_the_whole_model(ranks):
    ranks, alone, _ = ranks
    assert {found["fingerprint"] for found in ranks} == {alone["fingerprint"]}


def test_a_part_of_a_cache_has_no_file(ranks):
    ranks, alone, output = ranks
    for name in ("save", "load"):
        assert "is spread over" not in alone[name]
        for found in ranks:
            assert "LlamaForCausalLM is spread over 2 ranks" in found[name], name
    assert [path.name for path in output.glob("*.safetensors")] == ["alone-0.safetensors"]


def test_ranks_that_do_not_divide_the_heads_are_refused(tmp_path):
    build("llama", num_key_value_heads=1).save_pretrained(tmp_path / "model")
    for found in run(tmp_path / "model", tmp_path / "spread", 2, 4):
        assert "must divide the 1 KV heads of LlamaForCausalLM, but there are 2" in found["refusal"]
