import pytest

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.scheme import Override, Scheme, in_block

W4 = QuantSpec(bits=4, group_size=64)
A8 = QuantSpec(bits=8, granularity="token", dynamic=True)
KV4 = QuantSpec(bits=4, granularity="head", symmetric=False, dynamic=True)


def scheme(*overrides):
    return Scheme(W4, A8, KV4, KV4, overrides)


def test_without_exceptions_every_place_has_the_grid_of_its_kind():
    assert scheme().at("ffn_in", 0, 3) == Scheme(W4, A8, KV4, KV4)
    assert Scheme(weight=W4).at("ffn_in", 0, 3).act is None


def test_an_exception_changes_the_width_and_nothing_else_of_a_grid():
    rules = scheme(Override(sites=("ffn_mid",), weight_bits=8))
    assert rules.at("ffn_mid", 1, 3).weight == QuantSpec(bits=8, group_size=64)
    assert rules.at("ffn_mid", 1, 3).act == A8
    assert rules.at("ffn_in", 1, 3) == scheme()


def test_sixteen_bits_are_none_and_a_kind_without_a_grid_stays_without():
    rules = scheme(Override(kv_bits=16, act_bits=16))
    assert rules.at("k_cache", 0, 3) == Scheme(weight=W4)
    assert Scheme(weight=W4, overrides=(Override(act_bits=8),)).at("ffn_in", 0, 1).act is None


def test_blocks_count_from_either_end():
    rules = scheme(Override(blocks=(0, -1), weight_bits=8))
    assert [rules.at("ffn_in", i, 4).weight.bits for i in range(4)] == [8, 4, 4, 8]
    assert [len(in_block(rules.overrides, i, 4)) for i in range(4)] == [1, 0, 0, 1]
    assert in_block(rules.overrides, 3, 4) == (Override(weight_bits=8),)


def test_where_several_exceptions_hold_the_last_counts():
    off, on = Override(weight_bits=16), Override(sites=("attn_in",), weight_bits=3)
    assert scheme(off, on).at("attn_in", 0, 2).weight.bits == 3
    assert scheme(on, off).at("attn_in", 0, 2).weight is None
    assert (
        scheme(off, Override(act_bits=4)).at("attn_in", 0, 2).weight is None
    )  # says nothing of it


def test_an_exception_for_linears_changes_their_weights_alone():
    rules = scheme(Override(sites=("attn_in",), linears=("attn.v",), weight_bits=8))
    assert rules.at("attn_in", 0, 2, "attn.v").weight.bits == 8
    assert rules.at("attn_in", 0, 2, "attn.q") == rules.at("attn_in", 0, 2) == scheme()
    assert rules.linears == ("attn.v",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sites=("ffn_out",)), "no site 'ffn_out'; there is: attn_in, query, k_cache"),
        (dict(weight_bits=1), r"weight_bits=1 is outside 2\.\.8 and not 16"),
        (dict(linears=("attn.q",), act_bits=8), "linears share what they read, so name the site"),
        (dict(kv_bits=9), r"kv_bits=9 is outside 2\.\.8 and not 16"),
    ],
)
def test_an_exception_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Override(**settings)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Override(act_bits=8), "act_bits=8, and there is no grid of that kind"),
        (Override(sites=("k_cache",), weight_bits=8), "weight_bits=8 at k_cache, where it changes"),
        (Override(sites=("ffn_mid",), weight_bits=8, kv_bits=8), "acts at k_cache, v_cache"),
    ],
)
def test_an_exception_without_effect_is_refused(rule, message):
    rules = Scheme(weight=W4, k=KV4, overrides=(rule,))
    with pytest.raises(ValueError, match=message):
        rules.check(2)


def test_an_exception_may_switch_off_what_is_not_there():
    Scheme(weight=W4, overrides=(Override(act_bits=16, kv_bits=16),)).check(2)


@pytest.mark.parametrize("block", [3, -4])
def test_an_exception_for_a_block_that_is_not_there_is_refused(block):
    rules = scheme(Override(blocks=(0, block), weight_bits=8))
    rules.check(4)
    with pytest.raises(ValueError, match=rf"block {block}, .* 3 blocks: 0\.\.2, or -3\.\.-1"):
        rules.check(3)
