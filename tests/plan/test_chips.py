"""Machines by name."""

import re

import pytest

from kdjax.errors import UserError
from kdjax.plan.chips import CHIPS, machine


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [
        ("v5e:16x16", 256, 256),
        ("v5p:4x4x8", 128, 128),
        ("v7x:2x2x2", 8, 16),
        ("gpu:8xH100", 8, 8),
        ("gpu:1xH200", 1, 1),
        ("cpu:8", 8, 8),
    ],
)
def test_a_name_says_how_many_chips_and_devices_there_are(name, chips, devices):
    found = machine(name)
    assert (found.chips, found.device_count, found.name) == (chips, devices, name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5x:16x16", "'v5x:16x16' names no chip that is known; did you mean 'v"),
        ("gpu:8xH10", "did you mean 'H100'"),
        ("H100:8", "names no chip that is known"),
        ("gpu:8xv5e", "names no chip that is known"),
        ("v5e:16", "wanted 2 whole numbers from 1, as in v5e:16x16"),
        ("v5p:4x4", "wanted 3 whole numbers from 1, as in v5p:4x4x8"),
        ("v5e:0x4", "wanted 2 whole numbers from 1"),
        ("v5e:4x-4", "wanted 2 whole numbers from 1"),
        ("cpu", "wanted 1 whole numbers from 1, as in cpu:8"),
        ("gpu:16xH100", "at most 8 GPUs"),
    ],
)
def test_a_wrong_name_is_one_line(name, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        machine(name)
    assert "\n" not in str(caught.value)


def test_every_row_is_whole():
    for name, chip in CHIPS.items():
        rates = (chip.memory, chip.bfloat16, chip.float32, chip.memory_rate, chip.network)
        assert all(rate > 0 for rate in rates) or (name == "cpu" and not any(rates))
