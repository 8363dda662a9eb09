"""Our logits against transformers', from the same directory on disk, in float32."""

import jax
import numpy as np
import pytest
import tiny

from jaxcomp.hub import encode, load_tokenizer, open_checkpoint
from jaxcomp.models.decoder import empty_cache, extend, forward
from jaxcomp.models.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

KEY = jax.random.key(0)
TOLERANCE = 1e-5  # of the range of the logits
LINEAR = dict(rope_type="linear", factor=2.0)
DYNAMIC = dict(rope_type="dynamic", factor=2.0)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(
    rope_type="longrope",
    original_max_position_embeddings=32,
    short_factor=[1 + i / 40 for i in range(32)],
    long_factor=[1 + i**1.5 / 20 for i in range(32)],
)
SCALINGS = {
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, magnitudes": YARN | dict(mscale=1.0, mscale_all_dim=0.5, beta_fast=3.0),
    "yarn, given magnitude": YARN
    | dict(attention_factor=1.5, truncate=False, beta_fast=3.0, beta_slow=0.7),
    "longrope": LONGROPE,
    "longrope, given magnitude": LONGROPE | dict(attention_factor=1.5),
    "longrope, given factor": LONGROPE | dict(factor=4.0),
}


def reference(directory, tokens, valid=None, **how):
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(directory, dtype=torch.float32, **how)
    extra = {}
    if valid is not None:
        positions = np.maximum(np.cumsum(valid, axis=-1) - 1, 0)
        extra = dict(attention_mask=torch.tensor(valid), position_ids=torch.tensor(positions))
    with torch.no_grad():
        return model.eval()(torch.tensor(np.asarray(tokens, np.int64)), **extra).logits.numpy()


def assert_close(ours, theirs, valid=None):
    valid = np.ones(ours.shape[:2], bool) if valid is None else valid
    ours, theirs = np.asarray(ours)[valid], theirs[valid]
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.ptp(theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_whole_sequences(family, tmp_path):
    directory, tokens = tiny.checkpoint(family, KEY, tmp_path), tiny.tokens(KEY)
    ours = forward(open_checkpoint(directory).model, tokens)
    assert_close(ours, reference(directory, tokens))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_padded_sequences(family, side, tmp_path):
    directory, tokens = tiny.checkpoint(family, KEY, tmp_path), tiny.tokens(KEY)
    lengths = np.array([[16], [11]])
    valid = np.arange(16) < lengths if side == "right" else np.arange(16) >= 16 - lengths
    ours = forward(open_checkpoint(directory).model, tokens, valid)
    assert_close(ours, reference(directory, tokens, valid), valid)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_step_by_step_gives_the_logits_of_the_whole(family):
    model, tokens = tiny.model(family, KEY), tiny.tokens(KEY)
    cache = empty_cache(model, batch=2, capacity=20)
    logits, cache = extend(model, tokens[:, :12], cache)
    steps = [logits]
    for i in range(12, 16):
        logits, cache = extend(model, tokens[:, i : i + 1], cache)
        steps.append(logits)
    assert_close(np.concatenate(steps, axis=1), np.asarray(forward(model, tokens)))


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scalings_beyond_the_original_context(scaling, spelling, tmp_path):
    values = SCALINGS[scaling]
    if spelling == "old":
        fields = dict(
            rope_scaling={"type" if k == "rope_type" else k: v for k, v in values.items()}
        )
    else:
        fields = dict(rope_theta=None, rope_parameters=values | dict(rope_theta=10_000.0))
    fields |= dict(head_dim=64)  # enough channel pairs for some to lie on every part of a ramp
    directory = tiny.checkpoint("llama", KEY, tmp_path, **fields)
    tokens = tiny.tokens(KEY, batch=1, time=96)
    ours = forward(open_checkpoint(directory).model, tokens)
    assert_close(ours, reference(directory, tokens))


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scalings_of_the_blocks_without_a_window(scaling, spelling, tmp_path):
    # transformers overlooks truncate=False where it stands in the object of a layer type.
    values = {k: v for k, v in SCALINGS[scaling].items() if k != "truncate"}
    fields = dict(rope_scaling=values)
    if spelling == "new":
        ropes = dict(full_attention=values | dict(rope_theta=1e6), sliding_attention=LINEAR)
        fields = dict(rope_theta=None, rope_parameters=ropes)
    fields |= dict(head_dim=64)
    directory = tiny.checkpoint("gemma3_text", KEY, tmp_path, **fields)
    tokens = tiny.tokens(KEY, batch=1, time=96)
    ours = forward(open_checkpoint(directory).model, tokens)
    assert_close(ours, reference(directory, tokens))


@pytest.mark.parametrize("time", [12, 13, 40])
@pytest.mark.parametrize("share", [0.75, 1.0])
def test_longrope_on_both_sides_of_the_original_context(share, time, tmp_path):
    fields = dict(partial_rotary_factor=share, sliding_window=5)
    directory = tiny.checkpoint("phi3", KEY, tmp_path, **fields)
    tokens = tiny.tokens(KEY, time=time)
    ours = forward(open_checkpoint(directory).model, tokens)
    assert_close(ours, reference(directory, tokens))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (dict(use_sliding_window=True, sliding_window=6, max_window_layers=1), [None, 6]),
        (dict(use_sliding_window=True, sliding_window=6, max_window_layers=0), [6, 6]),
        (dict(use_sliding_window=False, sliding_window=6, max_window_layers=0), [None, None]),
        (
            dict(
                use_sliding_window=True,
                sliding_window=6,
                layer_types=["sliding_attention", "full_attention"],
            ),
            [6, None],
        ),
    ],
)
def test_attention_windows_by_layer(family, fields, windows, tmp_path):
    directory, tokens = tiny.checkpoint(family, KEY, tmp_path, **fields), tiny.tokens(KEY)
    model = open_checkpoint(directory).model
    assert [block.struct().attn.window for block in model.blocks] == windows
    assert_close(forward(model, tokens), reference(directory, tokens))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", dict(attention_bias=True, mlp_bias=True)),
        ("llama", dict(hidden_act="gelu_pytorch_tanh", num_key_value_heads=4)),
        ("qwen3", dict(attention_bias=True, num_key_value_heads=1)),
        ("mistral", dict(sliding_window=None, tie_word_embeddings=True)),
        ("mistral", dict(head_dim=None)),
        ("gemma3_text", dict(attention_bias=True, tie_word_embeddings=False)),
        ("gemma3_text", dict(sliding_window_pattern=1, num_key_value_heads=1)),
        (
            "gemma3_text",
            dict(sliding_window_pattern=None, layer_types=["full_attention", "sliding_attention"]),
        ),
        ("gemma3_text", dict(head_dim=None, query_pre_attn_scalar=None)),
        ("olmo2", dict(attention_bias=True, head_dim=16, tie_word_embeddings=True)),
        ("olmo2", dict(rope_scaling=YARN, num_key_value_heads=4)),
        ("phi3", dict(rope_scaling=None, original_max_position_embeddings=None)),
        ("phi3", dict(rope_scaling=None, partial_rotary_factor=None, sliding_window=6)),
        ("phi3", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    ],
)
def test_variants_of_a_family(family, fields, tmp_path):
    directory, tokens = tiny.checkpoint(family, KEY, tmp_path, **fields), tiny.tokens(KEY)
    ours = forward(open_checkpoint(directory).model, tokens)
    assert_close(ours, reference(directory, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_that_transformers_saved_is_the_same_model(family, tmp_path):
    directory, tokens = tiny.checkpoint(family, KEY, tmp_path / "ours"), tiny.tokens(KEY)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    a, b = (open_checkpoint(tmp_path / name).model for name in ("ours", "theirs"))
    assert [block.struct() for block in a.blocks] == [block.struct() for block in b.blocks]
    np.testing.assert_array_equal(forward(a, tokens), forward(b, tokens))


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers():
    pytest.importorskip("gguf")
    checkpoint = open_checkpoint("demo:smollm2")
    text = "The Atlantic Ocean covers 17% of Earth's surface, an area of 85,133,000 km2."
    ids = encode(load_tokenizer(checkpoint), text, checkpoint.model.config.vocab_size)[None]
    directory, name = checkpoint.path.parent, checkpoint.path.name
    theirs = reference(directory, ids, gguf_file=name)
    ours = forward(checkpoint.model, ids)
    assert_close(ours, theirs)
    np.testing.assert_array_equal(np.argmax(ours, -1), np.argmax(theirs, -1))
