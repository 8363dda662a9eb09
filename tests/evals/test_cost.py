import jax

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.evals import Cost
from jaxcomp.methods import RTN
from tests import tiny


def test_cost_counts_what_is_stored_and_measures_speed():
    model = tiny.model("llama", jax.random.key(0))
    cost = Cost(prompt=8, new=3, repeats=1)
    dense, packed = cost(model), cost(RTN(weight=QuantSpec(4))(model).model)
    stored = sum(x.nbytes for x in jax.tree.leaves(model))
    assert dense["bytes"] == stored and dense["bits_per_weight"] == 32
    assert packed["bytes"] < stored and 4 < packed["bits_per_weight"] < 8
    for numbers in (dense, packed):
        assert numbers["prefill_tokens_per_s"] > 0 and numbers["decode_tokens_per_s"] > 0
        assert numbers["peak_rss_bytes"] > stored
