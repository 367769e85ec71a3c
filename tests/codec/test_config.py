"""Configurations: which are equal, and what is said of those that are not."""

import json
from dataclasses import replace

import pytest

from rotormlx.config import QUALITIES, ROTATIONS, RotorConfig

OTHERS = {
    "key_bits": 3,
    "value_bits": 8,
    "rotation": "dense",
    "channel_scale": "calibrated",
    "sink": 5,
    "window": 65,
    "seed": 1,
}


@pytest.mark.parametrize("rotation", [*ROTATIONS, "calibrated"])
def test_a_channel_scale_of_none_is_what_it_stands_for(rotation):
    own = RotorConfig(rotation=rotation)
    default = "none" if rotation == "calibrated" else "prefill"
    same = RotorConfig(rotation=rotation, channel_scale=default)
    assert own == same
    assert len({own, same}) == 1
    assert own.difference(same) is None
    # As the user gave it: another rotation has another default.
    assert own.channel_scale is None
    assert json.loads(own.to_json())["channel_scale"] is None
    assert RotorConfig.from_json(same.to_json()) == own


@pytest.mark.parametrize("field", OTHERS)
def test_what_differs_is_named_with_both_values(field):
    own = RotorConfig()
    other = replace(own, **{field: OTHERS[field]})
    before = "prefill" if field == "channel_scale" else getattr(own, field)
    assert own != other
    assert own.difference(other) == (field, before, OTHERS[field])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("seed"), "but 'seed' is missing or unknown"),
        (lambda c: c.update(bits=4), "but 'bits' is missing or unknown"),
    ],
)
def test_a_text_with_other_fields_is_refused_by_its_field(change, says):
    content = json.loads(RotorConfig().to_json())
    change(content)
    with pytest.raises(ValueError, match=says) as error:
        RotorConfig.from_json(json.dumps(content))
    assert "{" not in str(error.value)


@pytest.mark.parametrize(("quality", "bits"), [("high", 4), ("balanced", 3), ("small", 2)])
def test_a_quality_is_a_name_for_bits(quality, bits):
    assert RotorConfig.of_quality(quality, sink=9) == RotorConfig(bits, bits, sink=9)
    assert RotorConfig.of_quality(quality, key_bits=8) == RotorConfig(8, bits)


def test_the_default_is_the_first_quality():
    assert RotorConfig.of_quality(next(iter(QUALITIES))) == RotorConfig()


def test_an_unknown_quality_is_refused():
    with pytest.raises(ValueError, match="quality must be one of high, balanced, small, but 'no'"):
        RotorConfig.of_quality("no")


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("4", RotorConfig()),
        ("3", RotorConfig(3, 3)),
        ("k8v4", RotorConfig(8, 4)),
        ("K3V2", RotorConfig(3, 2)),
        ("balanced", RotorConfig(3, 3)),
        ("key_bits=4,value_bits=2", RotorConfig(4, 2)),
        (" 8 , window = 0 ,sink=9", RotorConfig(8, 8, window=0, sink=9)),
        (
            "rotation=hadamard,channel_scale=none",
            RotorConfig(rotation="hadamard", channel_scale="none"),
        ),
    ],
)
def test_a_configuration_in_text(text, config):
    assert RotorConfig.from_text(text) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("five", r"Bits \(4 or k8v4\), a quality \(high, .*\) or a field .* but 'five' was given"),
        ("", "but '' was given; write 4, or key_bits=4,value_bits=2"),
        ("4,", "but '' was given"),
        ("bits=4", "but 'bits=4' was given"),
        ("k8", "but 'k8' was given"),
        ("4,key_bits=2", "given once, but '4,key_bits=2' gives key_bits twice"),
        ("5", "key_bits must be one of 2, 3, 4, 8, but 5 was given"),
        ("window=all", "window must be an integer from 0 to 1048575, but 'all' was given"),
        ("rotation=round", "rotation must be one of cascade, .* but 'round' was given"),
    ],
)
def test_a_text_that_is_no_configuration_is_refused(text, says):
    with pytest.raises(ValueError, match=rf"^\[RotorConfig\] .*{says}"):
        RotorConfig.from_text(text)
