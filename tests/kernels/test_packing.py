import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import packing
from pallas_kernels.packing import packed_rows

pack = jax.jit(packing.pack, static_argnames="bits")
unpack = jax.jit(packing.unpack, static_argnames=("bits", "in_ch"))


def random_codes(shape, bits, seed=0):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return np.random.default_rng(seed).integers(low, high, shape, np.int8, endpoint=True)


def bit_stream(column, bits):
    """The bytes of one column as one Python integer, code i at bit i·bits."""
    stream = sum((int(code) % 2**bits) << (i * bits) for i, code in enumerate(column))
    return list(stream.to_bytes(math.ceil(len(column) * bits / 8), "little"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rows", [1, 7, 24])
def test_bytes_are_the_bit_stream_of_each_column(bits, rows):
    codes = random_codes((rows, 3), bits, rows)
    packed = np.asarray(pack(codes, bits=bits))
    assert packed.dtype == np.uint8 and packed.shape == (packed_rows(rows, bits), 3)
    for column in range(3):
        assert packed[:, column].tolist() == bit_stream(codes[:, column], bits)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_unpacking_undoes_packing_for_every_width_and_length(bits, rows, seed):
    codes = random_codes((rows, 2), bits, seed)
    found = unpack(pack(codes, bits=bits), bits=bits, in_ch=rows)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_survives(bits):
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int8)[:, None]
    np.testing.assert_array_equal(
        unpack(pack(codes, bits=bits), bits=bits, in_ch=len(codes)), codes
    )


def test_two_rows_of_four_bits_make_the_byte_of_the_contract():
    assert np.asarray(pack(np.array([[-8], [7]], np.int8), bits=4)).tolist() == [[0x78]]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_leading_axes_are_independent(bits):
    codes = random_codes((2, 3, 11, 4), bits)
    packed = np.asarray(pack(codes, bits=bits))
    assert packed.shape == (2, 3, packed_rows(11, bits), 4)
    np.testing.assert_array_equal(packed[1, 2], pack(codes[1, 2], bits=bits))
    np.testing.assert_array_equal(unpack(packed, bits=bits, in_ch=11), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_streams_of_their_own_in_whole_bytes(bits):
    codes = random_codes((2, 3, 11), bits)
    packed = np.asarray(packing.pack_rows(codes, bits))
    assert packed.shape == (2, 3, packed_rows(11, bits))
    assert packed[1, 2].tolist() == bit_stream(codes[1, 2], bits)
    np.testing.assert_array_equal(packing.unpack_rows(packed, bits, 11), codes)


@pytest.mark.parametrize("bits", [3, 5, 7])
def test_the_last_byte_is_filled_with_zero_bits(bits):
    packed = np.asarray(pack(np.full((3, 1), -1, np.int8), bits))
    assert packed[-1, 0] == (1 << (3 * bits) % 8) - 1


@given(st.integers(1, 8), st.integers(1, 1000))
def test_a_column_takes_no_more_bytes_than_its_bits_need(bits, rows):
    assert packed_rows(rows, bits) == math.ceil(rows * bits / 8)
