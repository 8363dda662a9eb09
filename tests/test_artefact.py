import dataclasses
import json
import os

import chex
import jax
import numpy as np
import pytest

from jaxcomp import artefact
from jaxcomp.core.files import read_sealed, write_sealed
from jaxcomp.core.store import StoredTree, save_tree
from jaxcomp.models.decoder import forward, iter_blocks, map_blocks
from tests import heterogeneous


@pytest.fixture(scope="module")
def model():
    return heterogeneous.model()


@pytest.fixture
def place(model, tmp_path):
    files = {"tokenizer/tokenizer.json": b"{}", "config.json": b"{}"}
    artefact.save(model, tmp_path / "out", recipe={"steps": []}, report={"rows": []}, files=files)
    return tmp_path / "out"


def assert_same_model(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(a, jax.tree.map(np.asarray, b))


def test_a_model_comes_back_bit_for_bit(model, place):
    assert_same_model(artefact.load(place), model)
    assert artefact.read_json(place, "recipe.json") == {"steps": []}
    assert artefact.read_json(place, "report.json") == {"rows": []}
    assert (place / "tokenizer" / "tokenizer.json").read_bytes() == b"{}"
    assert artefact.is_artefact(place) and not artefact.is_artefact(place.parent)


def test_lazy_blocks_are_handles_and_give_the_same_logits(model, place):
    lazy = artefact.load(place, lazy=True)
    assert all(isinstance(block, StoredTree) for block in lazy.blocks)
    tokens = np.arange(6)[None]
    np.testing.assert_array_equal(forward(lazy, tokens), forward(model, tokens))


def test_the_compute_dtype_is_replaced_and_weights_keep_theirs(model, place):
    loaded = artefact.load(place, compute_dtype="bfloat16")
    assert loaded.config == dataclasses.replace(model.config, compute_dtype="bfloat16")
    assert loaded.embed.weight.dtype == np.float32


def test_stored_blocks_are_linked_and_not_written_again(model, tmp_path):
    stored = map_blocks(model, lambda _, b: b, lambda i, b: save_tree(tmp_path / f"work.{i}", b))
    artefact.save(stored, tmp_path / "out")
    files = [f for f in (tmp_path / "out" / "params" / "blocks.0").rglob("*") if f.is_file()]
    assert files and all(os.stat(f).st_nlink == 2 for f in files)
    assert_same_model(artefact.load(tmp_path / "out"), model)


def test_where_links_are_impossible_files_are_copied(model, place, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError("not here")

    monkeypatch.setattr(os, "link", no_link)
    artefact.save(artefact.load(place, lazy=True), tmp_path / "copy")
    assert_same_model(artefact.load(tmp_path / "copy"), model)


def test_leaf_hashes_tell_equal_runs_from_different_ones(model, place, tmp_path):
    artefact.save(model, tmp_path / "again")
    artefact.save(heterogeneous.model(seed=1), tmp_path / "other")
    hashes = artefact.leaf_hashes(place)
    assert hashes == artefact.leaf_hashes(tmp_path / "again")
    assert hashes != artefact.leaf_hashes(tmp_path / "other")
    assert {"embed.weight", "blocks.1.attn.q.w.packed", "blocks.2.gate"} <= set(hashes)


def test_a_flipped_byte_in_any_file_is_found_and_the_file_is_named(place):
    files = [f for f in place.rglob("*") if f.is_file()]
    assert len(files) > 20
    for i, file in enumerate(files):
        raw = bytearray(file.read_bytes())
        raw[(i * 7919) % len(raw)] ^= 1 << (i % 8)
        intact = file.read_bytes()
        file.write_bytes(bytes(raw))
        with pytest.raises(ValueError, match=f"{file.name} .*(has changed|was edited)"):
            artefact.load(place, lazy=True)
        file.write_bytes(intact)
    artefact.load(place)


def test_every_byte_of_the_manifest_counts(place):
    file = place / artefact.MANIFEST
    raw = file.read_bytes()
    for i in range(0, len(raw), len(raw) // 150):
        file.write_bytes(raw[:i] + bytes([raw[i] ^ 0x29]) + raw[i + 1 :])  # space ↔ tab among them
        with pytest.raises(ValueError, match=r"manifest\.json does not have the sha256"):
            artefact.read_manifest(place)


def test_damaged_weights_are_found_without_verification_too(place):
    data = max(place.glob("params/blocks.1/**/d/*"), key=lambda f: f.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(bytes(raw))
    lazy = artefact.load(place, lazy=True, verify=False)
    with pytest.raises((ValueError, OSError), match=r"(leaf|reading).*again"):
        list(iter_blocks(lazy))


def test_missing_and_added_files_are_named(place):
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt .*does not list"):
        artefact.load(place)
    artefact.load(place, lazy=True, verify=False)
    (place / "notes.txt").unlink()
    (place / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lacks config\.json \(1 in all\)"):
        artefact.load(place)


def rewrite(place, change):
    manifest = read_sealed(place / artefact.MANIFEST)
    change(manifest)
    write_sealed(place / artefact.MANIFEST, manifest)


def test_a_later_version_and_an_unknown_node_are_refused_by_name(place):
    rewrite(place, lambda m: m["parts"]["blocks.2"]["skeleton"]["ffn"].update({"class": "Future"}))
    with pytest.raises(ValueError, match=r"ffn is a 'Future', .*known: .*DenseFFN"):
        artefact.load(place, lazy=True)
    rewrite(place, lambda m: m.update(version=99))
    with pytest.raises(ValueError, match="version 99; known: 1"):
        artefact.load(place)


@pytest.mark.parametrize("fails_at", range(4))
def test_a_run_that_dies_on_the_way_leaves_nothing_that_loads(
    model, fails_at, tmp_path, monkeypatch
):
    parts = iter(range(99))

    def dying(*args):
        if next(parts) == fails_at:
            raise KeyboardInterrupt
        return write(*args)

    write = artefact.write_tree
    monkeypatch.setattr(artefact, "write_tree", dying)
    with pytest.raises(KeyboardInterrupt):
        artefact.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_temporary_of_a_killed_run_does_not_load_and_is_removed(model, place, tmp_path):
    killed = tmp_path / ".again.tmp"
    (place / artefact.MANIFEST).unlink()
    place.rename(killed)
    with pytest.raises(ValueError, match="is not an artefact"):
        artefact.load(killed)
    artefact.save(model, tmp_path / "again")
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_an_older_artefact_is_replaced_only_on_request_and_only_by_a_whole_one(model, place):
    with pytest.raises(ValueError, match="overwrite=True"):
        artefact.save(model, place)
    with pytest.raises(ValueError, match="which is no file"):
        artefact.save(model, place, files={"x": place / "absent"}, overwrite=True)
    artefact.load(place)
    artefact.save(artefact.load(place, lazy=True), place, recipe={"steps": [1]}, overwrite=True)
    assert_same_model(artefact.load(place), model)
    assert artefact.read_json(place, "recipe.json") == {"steps": [1]}
    assert [p.name for p in place.parent.iterdir()] == ["out"]


def test_other_peoples_files_are_never_replaced(model, place, tmp_path):
    (place / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds notes\.txt"):
        artefact.save(model, place, overwrite=True)
    (tmp_path / "home").mkdir()
    artefact.check_output(tmp_path / "home")
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis\.tex and is no artefact"):
        artefact.save(model, tmp_path / "home", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        artefact.check_output(tmp_path / "home" / "thesis.tex")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "manifest.json", "params/x", "recipe.json", ""])
def test_files_cannot_leave_the_artefact_or_shadow_its_own(name, model, tmp_path):
    with pytest.raises(ValueError, match="use a relative path"):
        artefact.save(model, tmp_path / "out", files={name: b""})


def test_what_is_no_artefact_or_lacks_a_file_says_what_there_is(place, tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json in it; give a directory"):
        artefact.load(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"no 'results\.json'; there is: config\.json, recipe\.json"
    ):
        artefact.read_json(place, "results.json")


def test_nothing_stored_is_pickled(place):
    assert not [f for f in place.rglob("*") if f.suffix in (".pkl", ".pickle", ".npy")]
    json.loads((place / artefact.MANIFEST).read_text())
