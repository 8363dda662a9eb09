import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp.core.quantize import QuantSpec
from jaxcomp.core.store import save_tree
from jaxcomp.hub import dense
from jaxcomp.hub.read import open_checkpoint
from jaxcomp.hub.tokenizer import encode, load_tokenizer
from jaxcomp.hub.write import ExportSource
from jaxcomp.methods import RTN
from jaxcomp.models import session as session_module
from jaxcomp.models.decoder import forward, map_blocks
from jaxcomp.models.generate import Conversation, Speed, generate_tokens
from jaxcomp.models.prepare import prepare
from jaxcomp.models.sampling import Sampling
from jaxcomp.models.session import Session
from tests import tiny

NEW = 5
PROMPTS = [
    "The Atlantic Ocean is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):",
    "The three laws of motion say that",
    "Dear Sir or Madam, I am writing to you because the parcel that I ordered three weeks ago",
]
logits_of = jax.jit(forward)


@pytest.fixture(scope="module")
def model():
    return prepare(tiny.model("mistral", jax.random.key(0)))


@pytest.fixture(scope="module")
def w4a4kv4():
    act = QuantSpec(4, granularity="token", dynamic=True)
    kv = QuantSpec(4, granularity="head", symmetric=False, dynamic=True)
    method = RTN(QuantSpec(bits=4, group_size=16), act=act, kv=kv)
    return prepare(method(tiny.model("mistral", jax.random.key(0))).model)


@pytest.fixture
def small_sizes(monkeypatch):
    """Chunks and caches so small that short sequences outgrow them."""
    monkeypatch.setattr(session_module, "BUCKET", 4)
    monkeypatch.setattr(session_module, "CHUNK", 8)
    monkeypatch.setattr(session_module, "ROOMY", 16)
    monkeypatch.setattr(session_module, "capacity_for", lambda slots: -(-slots // 16) * 16)


def prompts_of(lengths, seed=1):
    tokens = np.asarray(tiny.tokens(jax.random.key(seed), len(lengths), max(lengths)))
    return [row[:n] for row, n in zip(tokens, lengths, strict=True)]


def greedy(model, prompt, new=NEW):
    """One whole forward a token, no cache; padded to one length, which causality makes harmless."""
    ids = list(map(int, prompt))
    for _ in range(new):
        padded = jnp.asarray([ids + [0] * (48 - len(ids))], jnp.int32)
        ids.append(int(jnp.argmax(logits_of(model, padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def lists(found):
    return [tokens.tolist() for tokens in found.tokens]


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_each_token_is_the_most_likely_one_of_the_whole_forward(family):
    model, prompts = tiny.model(family, jax.random.key(0)), prompts_of([9, 9])
    found = generate_tokens(model, prompts, NEW)
    assert found.tokens[0].dtype == np.int32 and found.stops == ("length", "length")
    assert lists(found) == [greedy(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_other_lengths_are_answered_as_if_alone(side, model):
    prompts = prompts_of([9, 5, 7])
    tokens, valid = np.zeros((3, 9), np.int32), np.zeros((3, 9), bool)
    for i, ids in enumerate(prompts):
        place = slice(0, len(ids)) if side == "right" else slice(9 - len(ids), 9)
        tokens[i, place], valid[i, place] = ids, True
    wanted = [greedy(model, prompt) for prompt in prompts]
    assert lists(generate_tokens(model, tokens, NEW, valid=valid)) == wanted
    assert lists(generate_tokens(model, prompts, NEW)) == wanted


def test_a_long_prompt_comes_in_chunks_and_the_cache_grows(model, small_sizes):
    prompts = prompts_of([21, 3, 12, 20])
    found = generate_tokens(model, prompts, 15)
    assert lists(found) == [greedy(model, prompt, 15) for prompt in prompts]


def test_a_packed_cache_generates_what_the_simulation_does(w4a4kv4, small_sizes):
    prompts = prompts_of([8, 5])
    found = generate_tokens(w4a4kv4, prompts, 11)
    assert lists(found) == [greedy(w4a4kv4, prompt, 11) for prompt in prompts]


def test_a_sequence_ends_at_any_end_token_while_the_others_go_on(model):
    prompts = prompts_of([9, 9, 4])
    free = lists(generate_tokens(model, prompts, NEW))
    stop = free[0][2]
    ends = [ids.index(stop) + 1 if stop in ids else NEW for ids in free]
    shown = []
    found = generate_tokens(model, prompts, NEW, eos_ids=(1, stop), on_token=shown.append)
    assert lists(found) == [ids[:end] for ids, end in zip(free, ends, strict=True)]
    assert [s == "end" for s in found.stops] == [stop in ids for ids in free]
    for column, ids in zip(np.stack(shown, 1).tolist(), lists(found), strict=True):
        assert column == ids + [ids[-1]] * (len(column) - len(ids))
    assert found.speed.new_tokens == sum(ends) and found.speed.prompt_tokens == 22


def test_generation_stops_early_when_all_are_over_or_the_caller_says_so(model):
    (prompt,) = prompts_of([9])
    (free,) = lists(generate_tokens(model, [prompt], NEW))
    found = generate_tokens(model, [prompt], NEW, eos_ids=free[:1])
    assert lists(found) == [free[:1]] and found.stops == ("end",)
    seen = []
    found = generate_tokens(
        model, [prompt], NEW, on_token=lambda t: seen.append(t) or len(seen) > 1
    )
    assert lists(found) == [free[:2]] and found.stops == ("caller",)


def test_sizes_of_one_bucket_share_their_compilations(model):
    speed = generate_tokens(model, prompts_of([9] * 5), 2).speed
    # what the blocks read, a block, the head; a step; a choice
    assert speed.compilations == 5 and speed.compile_seconds > 0
    for lengths, new in (([3, 4, 5, 6, 7, 8], 3), ([20, 2, 7, 1, 1], 30), ([40] * 8, 2)):
        speed = generate_tokens(model, prompts_of(lengths), new).speed
        assert (speed.compilations, speed.compile_seconds) == (0, 0.0)


def test_a_seed_fixes_what_is_drawn_whatever_else_is_in_the_batch(model):
    prompts, sampling = prompts_of([9, 4, 6]), Sampling(1.0, top_p=0.95, seed=3)
    together = lists(generate_tokens(model, prompts, NEW, sampling=sampling))
    assert together == lists(generate_tokens(model, prompts, NEW, sampling=sampling))
    for i in range(3):
        alone = generate_tokens(model, prompts[i : i + 1], NEW, sampling=sampling, rows=[i])
        assert lists(alone) == together[i : i + 1]
    assert together != lists(generate_tokens(model, prompts, NEW, sampling=Sampling(1.0, seed=4)))


def test_a_repetition_penalty_falls_on_the_prompt_and_on_what_was_generated(model):
    prompts, sampling = prompts_of([9, 4]), Sampling(repetition_penalty=1e9)
    for prompt, new in zip(
        prompts, lists(generate_tokens(model, prompts, 20, sampling=sampling)), strict=True
    ):
        assert len(set(new)) == 20 and not set(new) & set(prompt.tolist())


def test_a_conversation_goes_on_as_if_it_had_been_fed_at_once(model):
    sampling = Sampling(0.8, repetition_penalty=1.3)
    talk, ids = Conversation(model, sampling), prompts_of([7])[0].tolist()
    for more in ([5, 6, 7], list(range(10, 20)), [8]):
        found = talk.reply(ids, NEW)
        assert lists(found) == lists(generate_tokens(model, [ids], NEW, sampling=sampling))
        ids += found.tokens[0].tolist() + more
    assert found.speed.prompt_tokens == 10 + 1  # what came last, and the token chosen before it


def test_a_conversation_that_takes_another_turn_forgets_what_is_not_shared(w4a4kv4):
    talk, ids = Conversation(w4a4kv4, eos_ids=(3,)), prompts_of([12])[0].tolist()
    talk.reply(ids, NEW)
    other = [*ids[:6], 9, 9]
    for again in (other, other, ids, ids[:2]):
        assert lists(talk.reply(again, NEW)) == lists(
            generate_tokens(w4a4kv4, [again], NEW, eos_ids=(3,))
        )


def test_padding_behind_what_a_cache_holds_is_refused(model):
    session = Session(model, 1)
    session.prefill(np.ones((1, 5), np.int32))
    with pytest.raises(ValueError, match="other lengths can only be fed to an empty cache"):
        session.prefill(np.ones((1, 3), np.int32), np.array([[False, True, True]]))


def test_a_rotary_embedding_that_depends_on_the_length_begins_anew():
    model = tiny.model("phi3", jax.random.key(0))
    talk, ids = Conversation(model), prompts_of([6])[0].tolist()
    for _ in range(3):  # past the original context of 12
        found = talk.reply(ids, NEW)
        assert lists(found) == lists(generate_tokens(model, [ids], NEW))
        assert found.speed.prompt_tokens == len(ids)
        ids += found.tokens[0].tolist()


def test_a_quantized_model_behind_handles_generates_like_its_own_forward(tmp_path):
    model = tiny.model("mistral", jax.random.key(0))
    small = RTN(QuantSpec(bits=4, group_size=16))(model).model
    stored = map_blocks(small, lambda _, b: b, lambda i, b: save_tree(tmp_path / f"{i}", b))
    (prompt,) = prompts_of([9], seed=3)
    assert lists(generate_tokens(stored, [prompt], 3)) == [greedy(small, prompt, 3)]


def damaged(model, where):
    bad = jnp.nan
    if where == "the embedding":
        return model.replace(embed=model.embed.replace(weight=model.embed.weight.at[7].set(bad)))
    if where == "the head":
        return model.replace(norm=model.norm.replace(weight=model.norm.weight.at[3].set(bad)))

    def hurt(i, block):
        up = block.ffn.up.replace(w=block.ffn.up.w.at[2, 2].set(bad))
        return block.replace(ffn=block.ffn.replace(up=up)) if i == 1 else block

    return map_blocks(model, hurt)


@pytest.mark.parametrize("where", ["the embedding", "block 1", "the head"])
def test_logits_that_are_not_finite_stop_it_and_the_first_bad_part_is_named(where):
    broken = damaged(tiny.model("mistral", jax.random.key(0)), where)
    message = f"logits after 4 tokens are not finite.* first output that is not is that of {where}"
    with pytest.raises(ValueError, match=message):
        generate_tokens(broken, [[1, 2, 7, 6]], 3)


@pytest.mark.parametrize(
    ("lengths", "new", "message"),
    [
        ([0], 3, "the prompt has no tokens; give at least one"),
        ([3, 60], 5, r"prompt 1 has 60 tokens, and max_tokens=5 is not 1\.\.4, .*context of 64"),
        ([9], 0, r"max_tokens=0 is not 1\.\.55"),
        ([64], 1, r"the prompt has 64 tokens, .*context of 64 .*shorten it to 63 tokens or fewer"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(lengths, new, message, model):
    with pytest.raises(ValueError, match=message):
        generate_tokens(model, [np.zeros(n, np.int32) for n in lengths], new)


def test_no_prompt_gives_nothing(model):
    found = generate_tokens(model, [], 3)
    assert (found.tokens, found.stops, found.speed) == ((), (), Speed())


def test_capacities_are_few_and_chunks_bounded():
    found = sorted({session_module.capacity_for(n) for n in range(1, 5000)})
    assert found == [128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144]
    chunks = [session_module.chunk_tokens(batch) for batch in (1, 8, 16, 32, 64, 256)]
    assert chunks == [512, 512, 256, 128, 64, 64]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [None, QuantSpec(4, group_size=64)], ids=["dense", "W4g64"])
def test_smollm2_generates_what_transformers_does(spec, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    checkpoint = open_checkpoint("demo:smollm2")
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = RTN(spec)(checkpoint.model).model if spec else checkpoint.model
    source = ExportSource(model, checkpoint.hf_config, tmp_path / "tokenizer", {})
    (tmp_path / "hf").mkdir()
    dense.write(source, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs.generation_config.eos_token_id = None  # all tokens are compared
    prompts = [encode(tokenizer, text, model.config.vocab_size) for text in PROMPTS]
    wanted = [
        theirs.generate(torch.tensor(ids[None]), max_new_tokens=64, do_sample=False)[0, len(ids) :]
        for ids in prompts
    ]
    wanted = [ids.tolist() for ids in wanted]
    model = prepare(model)
    assert lists(generate_tokens(model, prompts, 64)) == wanted
    assert [lists(generate_tokens(model, [ids], 64))[0] for ids in prompts] == wanted
