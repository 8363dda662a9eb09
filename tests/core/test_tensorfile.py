"""A safetensors file is read exactly or refused, and what is written is what others read."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from jaxcomp.core.tensorfile import DTYPES, WRITTEN, TensorFile, write_tensors


def some_tensors():
    rng = np.random.default_rng(0)
    return {
        "b": rng.standard_normal((3, 5)).astype(np.float32),
        "a": rng.standard_normal((4, 2, 3)).astype(ml_dtypes.bfloat16),
        "odd": np.arange(7, dtype=np.int8),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 4), np.int64),
    }


def file_of(path, entries, data=b"", metadata=None, raw=None):
    """A file with any header, right or wrong."""
    header = {} if metadata is None else {"__metadata__": metadata}
    for name, dtype, shape, offsets in entries:
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=offsets)
    raw = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def assert_same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = some_tensors()
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.specs.keys() == tensors.keys() and file.metadata == {"format": "pt"}
    for name, array in tensors.items():
        assert file.specs[name] == (array.shape, array.dtype)
        assert_same(file.read(name), array)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_the_reference_package_reads_what_is_written(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    tensors = some_tensors()
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = reference.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert_same(found[name], array)


def test_what_the_reference_package_writes_is_read(tmp_path):
    reference = pytest.importorskip("safetensors.numpy")
    tensors = some_tensors()
    reference.save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"a": "b"}
    for name, array in tensors.items():
        assert_same(file.read(name), array)


@pytest.mark.parametrize("dtype", WRITTEN, ids=str)
def test_every_byte_wide_dtype_makes_the_round_trip(dtype, tmp_path):
    array = np.arange(dtype.itemsize * 6, dtype=np.uint8) % 2
    array = array.view(dtype).reshape(2, 3)
    write_tensors(tmp_path / "x", {"t": array})
    assert_same(TensorFile(tmp_path / "x").read("t"), array)


def test_rows_are_a_part_of_the_tensor(tmp_path):
    tensors = some_tensors()
    write_tensors(tmp_path / "x", tensors)
    file = TensorFile(tmp_path / "x")
    for start, stop in [(0, 2), (1, 4), (2, 99), (3, 3), (9, 12)]:
        assert_same(file.rows("a", start, stop), tensors["a"][start:stop])


def test_the_same_tensors_give_the_same_bytes_aligned(tmp_path):
    tensors = some_tensors()
    write_tensors(tmp_path / "x", tensors)
    write_tensors(tmp_path / "y", dict(reversed(tensors.items())))
    raw = (tmp_path / "x").read_bytes()
    assert raw == (tmp_path / "y").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    assert n % 8 == 0
    for entry in json.loads(raw[8 : 8 + n]).values():
        assert entry["data_offsets"][0] % (DTYPES[entry["dtype"]][1] // 8) == 0


def test_views_and_transposes_are_written_by_value(tmp_path):
    array = np.arange(24.0).reshape(4, 6)
    write_tensors(tmp_path / "x", {"t": array.T, "half": array[::2]})
    file = TensorFile(tmp_path / "x")
    np.testing.assert_array_equal(file.read("t"), array.T)
    np.testing.assert_array_equal(file.read("half"), array[::2])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_tensors(tmp_path / "x", {"t": np.ones(3)})
    with pytest.raises(ValueError, match=r"'u' has dtype object, .*no byte-wide type"):
        write_tensors(tmp_path / "x", {"t": np.zeros(3), "u": np.array([None])})
    np.testing.assert_array_equal(TensorFile(tmp_path / "x").read("t"), np.ones(3))
    assert os.listdir(tmp_path) == ["x"]


def test_a_replaced_file_does_not_mix_with_an_open_one(tmp_path):
    write_tensors(tmp_path / "x", {"t": np.ones(3)})
    file = TensorFile(tmp_path / "x")
    write_tensors(tmp_path / "x", {"t": np.zeros(3)})
    np.testing.assert_array_equal(file.read("t"), np.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"", "0 bytes, and .* starts with 8"),
        (lambda raw: raw[:7], "7 bytes, and .* starts with 8"),
        (lambda raw: raw[:40], "a header of .* was expected and 32 bytes follow"),
        (lambda raw: raw[:-4], "should end the file .* cut by 4 bytes"),
        (lambda raw: raw + b"xx", "followed by 2 stray bytes"),
        (
            lambda raw: (200_000_000).to_bytes(8, "little") + raw[8:],
            "header of 200000000 bytes and the limit is 100000000",
        ),
        (lambda raw: raw[:8] + b"<" + raw[9:], "is not valid JSON"),
        (lambda raw: raw[:20] + b"\xff" + raw[21:], "is not valid JSON: 'utf-8'"),
    ],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    write_tensors(tmp_path / "x", {"t": np.ones((3, 5), np.float32)})
    (tmp_path / "x").write_bytes(change((tmp_path / "x").read_bytes()))
    with pytest.raises(ValueError, match=f"{tmp_path / 'x'}: .*{message}"):
        TensorFile(tmp_path / "x")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a", "F32", [2], [0, 4])], r"'a': F32 of shape \[2\] takes 8 bytes and .* gives? it 4"),
        ([("a", "F32", [1], [0, 4]), ("b", "F32", [1], [2, 6])], "'b' .* overlaps tensor 'a'"),
        ([("a", "F32", [1], [0, 4]), ("b", "F32", [1], [0, 4])], "'b' .* overlaps tensor 'a'"),
        ([("a", "F32", [1], [4, 8])], "'a' should start at byte 0 .* leaves 4 bytes unused"),
        ([("a", "F32", [1], [8, 4])], "'a': F32 of shape .* takes 4 bytes"),
        ([("a", "F31", [1], [0, 4])], "'a': dtype 'F31' is unknown; the format has .*BF16"),
        ([("a", ["F32"], [1], [0, 4])], "is unknown; the format has"),
        ([("a", "F32", [-1], [0, 4])], "'a': shape and data_offsets must be"),
        ([("a", "F32", [1.0], [0, 4])], "'a': shape and data_offsets must be"),
        ([("a", "F32", [1], [0, 4, 8])], "'a': shape and data_offsets must be"),
        ([("a", "F32", [True], [0, 4])], "'a': shape and data_offsets must be"),
        ([("a", "F4", [3], [0, 2])], "'a': F4 of shape .* takes 1.5 bytes"),
    ],
)
def test_a_header_that_does_not_add_up_is_refused(entries, message, tmp_path):
    path = file_of(tmp_path / "x", entries, bytes(8))
    with pytest.raises(ValueError, match=message):
        TensorFile(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b"[]", "is not a JSON object"),
        (b' {"a": 1}', "is not a JSON object"),
        (b'{"a": 1}', "'a': dtype, shape and data_offsets were expected, found 1"),
        (b'{"a": {"dtype": "F32", "shape": []}}', "dtype, shape and data_offsets were expected"),
        (b'{"__metadata__": {"k": 1}}', "__metadata__ must map strings to strings"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_header_of_another_form_is_refused(raw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TensorFile(file_of(tmp_path / "x", [], raw=raw))


def test_a_file_cut_while_open_is_noticed(tmp_path):
    write_tensors(tmp_path / "x", {"t": np.ones(100)})
    file = TensorFile(tmp_path / "x")
    os.truncate(tmp_path / "x", 200)
    with pytest.raises(
        ValueError, match=r"'t': 800 bytes were expected and the file ends .* early"
    ):
        file.read("t")


def test_an_unknown_tensor_and_an_unpacked_type_are_named(tmp_path):
    file = TensorFile(file_of(tmp_path / "x", [("a", "F4", [4], [0, 2])], bytes(2)))
    assert file.specs["a"].shape == (4,)
    with pytest.raises(KeyError, match=r"no tensor 'b'; it has a"):
        file.read("b")
    with pytest.raises(ValueError, match=r"'a' has dtype float4_e2m1fn"):
        file.read("a")
