"""Every field of a config is used, harmless, or refused by name."""

import jax
import pytest
import tiny

from jaxcomp.core.tree import named_leaves
from jaxcomp.models.families import FAMILIES, Param, template_of
from jaxcomp.models.rope import Rope


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_names_every_tensor_once(family):
    template = template_of(tiny.hf_config(family))
    params = named_leaves(template).values()
    assert all(isinstance(param, Param) for param in params)
    assert len({param.name for param in params}) == len(params)
    assert all(
        param.transpose == param.name.endswith("proj.weight")
        for param in params
        if "embed" not in param.name and "lm_head" not in param.name
    )


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
        (dict(hidden_act="relu"), "hidden_act='relu' is not supported; there is silu"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (
            dict(rope_scaling=dict(type="longrope", factor=2.0)),
            "rope_type='longrope'.* there is def",
        ),
        (dict(rope_scaling=dict(type="linear")), "rope_scaling: factor is missing"),
        (dict(rope_scaling=dict(type="linear", factor=2.0, mscale=1.0)), "mscale='1.0'"),
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
        (dict(eos_token_id="2"), "eos_token_id='2' must be token ids"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(family, fields, message):
    if message is None:  # only where head_dim has no default of its own
        if family == "qwen3":
            return
        message = "hidden_size=32 is not a multiple of num_attention_heads=3 and head_dim"
    with pytest.raises(ValueError, match=message):
        template_of(tiny.hf_config(family, **fields))


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
