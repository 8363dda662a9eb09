"""Every field of a config is used, harmless, or refused by name."""

import math

import jax
import numpy as np
import pytest
import tiny

from jaxcomp.core.tree import named_leaves
from jaxcomp.models.families import FAMILIES, Param, template_of
from jaxcomp.models.families.template import stored_shape, stored_tensors
from jaxcomp.models.rope import Rope


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_names_every_tensor_once(family):
    template = template_of(tiny.hf_config(family))
    params = named_leaves(template).values()
    assert all(isinstance(param, Param) for param in params)
    assert len({(param.name, param.rows) for param in params}) == len(params)
    for name, parts in stored_tensors(template).items():
        rows = [np.arange(p.first_row, p.first_row + p.stored_shape[0]) for p in parts.values()]
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(stored_shape(parts)[0]), name)
    assert all(
        param.transpose == param.name.endswith("proj.weight")
        for param in params
        if "embed" not in param.name and "lm_head" not in param.name
    )


def test_leaves_that_leave_rows_of_a_tensor_out_or_share_them_are_a_bug():
    part = lambda *rows: Param("w", (4, rows[1] - rows[0]), True, rows)  # noqa: E731
    assert list(stored_tensors([part(3, 8), part(0, 3)])["w"]) == ["1", "0"]
    for parts in ([part(0, 3), part(4, 8)], [part(0, 3), part(2, 8)], [part(1, 3)]):
        with pytest.raises(AssertionError, match="the leaves of w overlap or leave rows out"):
            stored_tensors(parts)


def test_blocks_of_a_family_differ_only_in_the_names_of_their_tensors():
    first, second = template_of(tiny.hf_config("mistral")).blocks
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(logit_scale=0.5),
            "1 field.* not supported: logit_scale='0.5'.*allow_config=.'logit_s",
        ),
        (dict(quantization_config=dict(quant_method="gptq")), "gptq.* is already quantized"),
        (dict(architectures=["GPT2LMHeadModel"]), "GPT2LM.* is not supported; there is LlamaForC"),
        (dict(model_type="gemma"), "model_type='gemma' does not go with"),
        (dict(num_key_value_heads=3), "num_attention_heads=4 is not a multiple of .*heads=3"),
        (dict(num_attention_heads=3, num_key_value_heads=3, head_dim=None), None),
        (dict(head_dim=7), "head_dim=7 is odd"),
        (dict(hidden_size="32"), "hidden_size='32' must be a whole number"),
        (dict(num_hidden_layers=10**8), r"num_hidden_layers=100000000 is above 10000"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(rms_norm_eps=0), "rms_norm_eps=0 must be a number above 0"),
        (dict(eos_token_id="2"), "eos_token_id='2' must be token ids"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(family, fields, message):
    if message is None:  # only where head_dim has no default of its own
        if family in ("qwen3", "gemma3_text"):
            return
        message = "hidden_size=32 is not a multiple of num_attention_heads=3 and head_dim"
    with pytest.raises(ValueError, match=message):
        template_of(tiny.hf_config(family, **fields))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gemma3_text", "phi3")])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(hidden_act="relu"), "hidden_act='relu' is not supported; there is silu"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(rope_scaling=dict(type="su")), "rope_type='su'.* there is def"),
        (dict(rope_scaling=dict(type="linear")), "rope_scaling: factor is missing"),
        (dict(rope_scaling=dict(type="linear", factor=2.0, mscale=1.0)), "mscale='1.0'"),
        (
            dict(rope_scaling=dict(type="linear", factor=2.0, original_max_position_embeddings=8)),
            "original_max_position_embeddings='8'",
        ),
        (
            dict(
                original_max_position_embeddings=16,
                rope_scaling=dict(type="yarn", factor=2.0, original_max_position_embeddings=8),
            ),
            "original_max_position_embeddings=8 disagrees with the 16 outside",
        ),
        (dict(original_max_position_embeddings=16), "=16 means nothing with rope_type='default'"),
        (dict(rope_scaling=dict(type="longrope")), "short_factor is missing"),
        (
            dict(rope_scaling=dict(type="longrope", short_factor=[1.0], long_factor=[1.0])),
            "short_factor='1 entries' must be a list of [48] numbers",
        ),
        (
            dict(
                rope_scaling=dict(type="linear", factor=2.0),
                rope_parameters=dict(rope_type="default"),
            ),
            "rope_scaling=.* and rope_parameters=.* disagree",
        ),
        (
            dict(rope_parameters=dict(rope_type="default", rope_theta=5.0)),
            "rope_theta=10000.* disagree",
        ),
        (dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "one flat object"),
    ],
)
def test_a_rotary_embedding_that_cannot_be_followed_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message):
        template_of(tiny.hf_config(family, **fields))


LINEAR = dict(rope_type="linear", factor=2.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping='30.0'"),
        (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping='50.0'"),
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention='True'"),
        (dict(hidden_activation="relu"), "hidden_activation='relu' is not supported"),
        (dict(hidden_act="silu"), None),  # not a field of the family, and harmless nowhere
        (dict(num_key_value_heads=None), "num_key_value_heads is missing"),
        (dict(bos_token_id=None), "bos_token_id is missing, and the model is nonsense without"),
        (dict(query_pre_attn_scalar=0), "query_pre_attn_scalar=0 must be a number above 0"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor='0.5'"),
        (dict(layer_types=["full_attention"]), "layer_types=.* must name 2 blocks"),
        (dict(layer_types="full_attention"), "layer_types=full_attention must name 2 blocks"),
        (dict(sliding_window_pattern=0), "sliding_window_pattern=0 must be a whole number"),
        (
            dict(layer_types=["full_attention"] * 2),
            "layer_types=.* and sliding_window_pattern=2, .* every 1 .* disagree",
        ),
        (
            dict(sliding_window_pattern=None, _sliding_window_pattern=2),
            "_sliding_window_pattern='2'",
        ),
        (dict(rope_parameters=dict(rope_type="default")), "one object for each of full_attention"),
        (dict(rope_parameters=dict(chunked_attention=LINEAR)), "one object for each of full_att"),
        (dict(rope_parameters=dict(full_attention=5)), "rope_parameters.full_attention=5 must be"),
        (
            dict(
                rope_scaling=LINEAR, rope_parameters=dict(full_attention=LINEAR | dict(factor=3.0))
            ),
            "rope_scaling=.* and rope_parameters=.* disagree",
        ),
        (
            dict(rope_parameters=dict(sliding_attention=dict(rope_theta=5.0))),
            "rope_local_base_freq=10000.0 and .*sliding_attention.rope_theta=5.0 disagree",
        ),
        (
            dict(rope_parameters=dict(sliding_attention=dict(rope_theta=1e4, odd=3))),
            "rope_parameters.sliding_attention: 1 field.* odd='3'",
        ),
    ],
)
def test_what_gemma3_does_not_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=message or "hidden_act='silu'"):
        template_of(tiny.hf_config("gemma3_text", **fields))


def test_a_window_that_gemma3_has_but_the_config_denies_is_refused():
    config = tiny.hf_config("gemma3_text") | dict(sliding_window=None)
    with pytest.raises(ValueError, match=r"must name 2 blocks .*needs sliding_window"):
        template_of(config)
    attns = [b.attn for b in template_of(config | dict(sliding_window_pattern=1)).blocks]
    assert [attn.window for attn in attns] == [None, None]


def test_old_and_new_spellings_of_gemma3_mean_the_same():
    old = tiny.hf_config("gemma3_text", rope_scaling=LINEAR)
    ropes = dict(
        full_attention=LINEAR | dict(rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    )
    new = tiny.hf_config(
        "gemma3_text",
        rope_theta=None,
        rope_local_base_freq=None,
        rope_parameters=ropes,
        sliding_window_pattern=None,
        layer_types=["sliding_attention", "full_attention"],
        _sliding_window_pattern=6,  # as transformers saves it beside layer_types
    )
    assert template_of(old) == template_of(new)
    local, everywhere = (b.attn for b in template_of(new).blocks)
    assert (local.window, local.rope) == (8, Rope(1e4))
    assert (everywhere.window, everywhere.rope) == (None, Rope(1e6, "linear", 2.0))
    defaults = dict.fromkeys(("rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"))
    bare = template_of(
        tiny.hf_config("gemma3_text", **defaults, sliding_window=None, head_dim=None)
    )
    assert [b.attn.rope.theta for b in bare.blocks] == [1e4, 1e6]
    assert bare.blocks[0].attn.window == 4096 and bare.blocks[0].attn.head_dim == 256
    assert bare.blocks[0].attn.scale == 256**-0.5 and bare.lm_head is None


LONG = dict(short_factor=[1.0] * 3, long_factor=[2.0] * 3)
LONGROPE = LONG | dict(type="longrope")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "type='linear' is not supported for"),
        (dict(rope_scaling=dict(type="su", rope_type="yarn2")), "rope_type='yarn2' is not supp"),
        (dict(rope_scaling=LONG | dict(type="su", factor=0)), "factor=0 must be a number above 0"),
        (dict(rope_scaling=LONG | dict(type="su", short_mscale=1.1)), "short_mscale='1.1'"),
        (dict(rope_scaling=dict(type="su")), "short_factor is missing"),
        (
            dict(rope_scaling=LONGROPE, head_dim=16),
            "short_factor='3 entries' must be a list of 6 nu",
        ),
        (dict(partial_rotary_factor=0.4), "makes 3 of head_dim=8 channels turn"),
        (dict(partial_rotary_factor=1.5), "makes 12 of head_dim=8 channels turn"),
        (
            dict(rope_scaling=LONGROPE | dict(original_max_position_embeddings=9)),
            "original_max_position_embeddings=9 disagrees with the 12 outside",
        ),
        (
            dict(rope_scaling=LONG | dict(type="su", long_factor=[0.0] * 3)),
            "long_factor=.* above 0",
        ),
        (dict(attention_bias=True), "attention_bias='True'"),
        (dict(interpolate_factor=2), "interpolate_factor=2 is not supported; there is 1"),
        (dict(sliding_window="8"), "sliding_window='8' must be a whole number"),
    ],
)
def test_what_phi3_does_not_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        template_of(tiny.hf_config("phi3", **fields))


def test_the_names_that_longrope_had_mean_the_same():
    templates = [
        template_of(tiny.hf_config("phi3", rope_scaling=LONG | names))
        for names in (
            dict(type="su"),
            dict(type="yarn"),
            dict(type="longrope"),
            dict(rope_type="longrope", factor=64 / 12),
            dict(type="su", rope_type="longrope", original_max_position_embeddings=12),
        )
    ]
    assert all(other == templates[0] for other in templates)
    rope = templates[0].blocks[0].attn.rope
    assert (rope.kind, rope.original_context, rope.partial) == ("longrope", 12, 0.75)
    assert rope.attention_factor == pytest.approx((1 + math.log(64 / 12) / math.log(12)) ** 0.5)
    plain = tiny.hf_config("phi3", rope_scaling=None, original_max_position_embeddings=None)
    plain |= dict(auto_map={"AutoConfig": "a.B"}, resid_pdrop=0.1, full_attn_mod=1)
    assert template_of(plain).blocks[0].attn.rope == Rope(1e4, partial=0.75)


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_are_off_harmless_or_vouched_for_change_nothing(family):
    extra = dict(
        logit_scale=None, custom=False, auto_map={}, attention_dropout=0.1, dtype="bfloat16"
    )
    plain = template_of(tiny.hf_config(family))
    assert template_of(tiny.hf_config(family) | extra) == plain
    assert template_of(tiny.hf_config(family, logit_scale=0.5), allow=["logit_scale"]) == plain


def test_old_and_new_spellings_of_the_rotary_embedding_mean_the_same():
    yarn = dict(factor=4.0, original_max_position_embeddings=16)
    old = tiny.hf_config("llama", rope_scaling=dict(type="yarn", **yarn), rope_theta=5e5)
    new = dict(rope_type="yarn", rope_theta=5e5, **yarn)
    new = tiny.hf_config("llama", rope_theta=None, rope_parameters=new)
    assert template_of(old) == template_of(new)
    rope = template_of(old).blocks[0].attn.rope
    assert rope == Rope(5e5, "yarn", 4.0, 16, attention_factor=rope.attention_factor)
    assert rope.attention_factor == pytest.approx(1.1386294361)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(layer_types=["full_attention"]), "must name 2 blocks out of full_attention"),
        (dict(layer_types=["sliding_attention"] * 2), "needs use_sliding_window"),
        (dict(layer_types=["chunked_attention"] * 2), "must name 2 blocks"),
        (dict(use_sliding_window=True, max_window_layers=-1), "max_window_layers=-1 must be"),
    ],
)
def test_layer_types_without_a_block_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        template_of(tiny.hf_config("qwen2", **fields))


def test_token_ids_of_the_generation_config_win():
    config = tiny.hf_config("llama")
    assert template_of(config).config.eos_token_ids == (2,)
    assert template_of(config, generation={"eos_token_id": [7, 9]}).config.eos_token_ids == (7, 9)
    assert template_of(config, generation={"bos_token_id": 5}).config.bos_token_id == 5
