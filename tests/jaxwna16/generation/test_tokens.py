"""Generation against transformers' own, and its promises: one trace, seeds, stops, clear errors."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxwna16.errors import InputError, NanWarning
from jaxwna16.generation import decoding
from jaxwna16.generation.decoding import round_up
from jaxwna16.generation.tokens import generate_tokens, start_rows
from tests.jaxwna16.models.hf_models import convert, make_reference, random_tokens, reference_logits

PROMPTS = [random_tokens(n, seed=n).tolist() for n in (7, 19, 3)]
NEW = 33


@functools.cache
def make_pair(family: str):
    reference = make_reference(family)
    return reference, convert(reference)


@pytest.fixture
def model():
    return make_pair("llama")[1]


@pytest.mark.parametrize(
    "family",
    [
        "qwen2, second layer sliding",
        "llama, dynamic rope past its length",
        *(
            pytest.param(f, marks=pytest.mark.thorough)
            for f in ("llama", "mistral, window of 5", "qwen3")
        ),
    ],
)
def test_greedy_tokens_of_a_batch_equal_those_of_transformers_row_by_row(family):
    reference, model = make_pair(family)
    result = generate_tokens(model, PROMPTS, max_new_tokens=NEW)
    for prompt, ours in zip(PROMPTS, result.tokens, strict=True):
        reference = make_reference(family)  # dynamic rope keeps state from call to call
        with torch.no_grad():
            expected = reference.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False
            )
        assert ours == expected[0, len(prompt) :].tolist()
    assert result.finish_reasons == ["length"] * 3
    if not model.config.whole_prompts:  # 19 tokens in five pieces, 3 in one
        pieces = generate_tokens(model, PROMPTS, max_new_tokens=NEW, prefill_chunk=4)
        assert pieces.tokens == result.tokens


def test_decoding_is_traced_once_whatever_the_number_of_tokens_and_the_options(model):
    generate_tokens(model, PROMPTS[:2], max_new_tokens=17)
    before = dict(decoding.trace_counts)
    for new, temperature in [(17, 0.0), (25, 0.7), (30, 1.3)]:
        generate_tokens(
            model,
            PROMPTS[:2],
            max_new_tokens=new,
            temperature=temperature,
            top_k=new,
            seed=new,
            stop_tokens=range(new - 16),
            stream=lambda new_tokens: None,
        )
    assert dict(decoding.trace_counts) == before


def test_the_first_call_of_a_shape_traces_decoding_once(model):
    decoding.trace_counts.clear()
    generate_tokens(model, [PROMPTS[0]] * 5, max_new_tokens=40)
    assert decoding.trace_counts == {"prefill": 1, "decode": 1}


@pytest.mark.parametrize(("seconds", "sizes"), [(0.0, [1] * NEW), (1e9, [1, 1, NEW - 2])])
def test_a_stream_yields_all_tokens_in_pieces_that_take_a_time(model, monkeypatch, seconds, sizes):
    monkeypatch.setattr("jaxwna16.generation.tokens.STREAM_SECONDS", seconds)
    pieces = []
    result = generate_tokens(model, PROMPTS, max_new_tokens=NEW, stream=pieces.append)
    joined = [[t for piece in pieces for t in piece[row]] for row in range(3)]
    assert joined == result.tokens
    assert result.tokens == generate_tokens(model, PROMPTS, max_new_tokens=NEW).tokens
    assert [len(piece[0]) for piece in pieces] == sizes


def test_a_stop_token_ends_its_row_only_and_is_left_out(model):
    whole = generate_tokens(model, PROMPTS, max_new_tokens=NEW).tokens
    stop = whole[1][10]
    pieces = []
    result = generate_tokens(
        model, PROMPTS, max_new_tokens=NEW, stop_tokens=[stop], stream=pieces.append
    )
    for row, tokens in enumerate(whole):
        cut = tokens.index(stop) if stop in tokens else len(tokens)
        assert result.tokens[row] == tokens[:cut]
        assert result.finish_reasons[row] == ("stop" if stop in tokens else "length")
        assert [t for piece in pieces for t in piece[row]] == tokens[:cut]


def test_a_stream_can_end_rows(monkeypatch):
    monkeypatch.setattr("jaxwna16.generation.tokens.STREAM_SECONDS", 0.0)
    _, model = make_pair("qwen2, second layer sliding")
    whole = generate_tokens(model, PROMPTS, max_new_tokens=NEW).tokens
    pieces = []

    def end_row_1(new):
        pieces.append(new)
        return {1: 3} if len(pieces) == 4 else {}

    result = generate_tokens(model, PROMPTS, max_new_tokens=NEW, stream=end_row_1, logprobs=3)
    assert result.tokens == [whole[0], whole[1][:3], whole[2]]
    assert result.finish_reasons == ["length", "stop", "length"]
    assert [len(piece[1]) for piece in pieces] == [1] * 4 + [0] * (NEW - 4)
    assert result.logprobs is not None
    assert [len(row) for row in result.logprobs] == [NEW, 3, NEW]


@pytest.fixture(scope="module")
def sick():
    """A model that is sick of one token, and the row and place where it comes to that first."""
    whole = generate_tokens(make_pair("llama")[1], PROMPTS, max_new_tokens=NEW).tokens
    seen = {token for prompt in PROMPTS for token in prompt} | {*whole[0], *whole[2]}
    place, token = next((i, t) for i, t in enumerate(whole[1]) if i > 4 and t not in seen)
    assert token not in whole[1][:place]
    model = convert(make_reference("llama"))
    embedding = model.model.embed_tokens.weight
    embedding[...] = embedding[...].at[token].set(jnp.nan)
    return model, token, [whole[0], whole[1][: place + 1], whole[2]]


@pytest.mark.parametrize("stream", [None, lambda new: None])
def test_a_row_whose_logits_become_nan_ends_there_and_the_others_go_on(sick, stream):
    model, _, expected = sick
    steps = len(expected[1])
    with pytest.warns(NanWarning, match=f"prompt 1: after {steps} new tokens the logits are no"):
        result = generate_tokens(
            model, PROMPTS, max_new_tokens=NEW, stream=stream, logprobs=None if stream else 3
        )
    assert result.tokens == expected
    assert result.finish_reasons == ["length", "nan", "length"]
    assert [failure[:8] for failure in result.failures] == ["prompt 1"]
    if result.logprobs is not None:
        assert [len(row) for row in result.logprobs] == [NEW, steps, NEW]
        assert np.isfinite(result.logprobs[1]).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_prompt_with_nan_logits_gets_no_token_and_its_neighbours_get_theirs(
    sick, model, temperature
):
    unwell, token, _ = sick
    prompts = [PROMPTS[0], [*PROMPTS[1][:-1], token], PROMPTS[2]]
    options = {"max_new_tokens": 4, "temperature": temperature}
    with pytest.warns(NanWarning, match="prompt 1: after 0 new tokens"):
        result = generate_tokens(unwell, prompts, **options)
    well = generate_tokens(model, prompts, **options)
    assert token not in [*well.tokens[0], *well.tokens[2]]
    assert result.tokens == [well.tokens[0], [], well.tokens[2]]
    assert result.finish_reasons == ["length", "nan", "length"]


def test_what_a_stream_has_ended_before_is_not_nan(sick):
    model, _, expected = sick
    taken = []

    def end_row_1(new):
        taken.extend(new[1])
        return {1: 2} if len(taken) >= 2 else {}

    result = generate_tokens(model, PROMPTS, max_new_tokens=NEW, stream=end_row_1)
    assert result.tokens[1] == expected[1][:2]
    assert result.finish_reasons == ["length", "stop", "length"]


def test_logprobs_are_those_of_the_model_before_any_option_changes_them():
    """Both logits are within 1e-4 of the largest, and log_softmax adds the error of its sum."""
    reference, model = make_pair("qwen2, second layer sliding")
    result = generate_tokens(
        model, PROMPTS, max_new_tokens=NEW, temperature=0.5, top_k=9, top_p=0.9, logprobs=3
    )
    assert result.logprobs is not None and result.top_logprobs is not None
    for row, prompt in enumerate(PROMPTS):
        tokens = result.tokens[row]
        logits = reference_logits(reference, np.array([prompt + tokens]))[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)
        error = 2e-4 * np.abs(logits).max()
        chosen = expected[torch.arange(NEW), torch.tensor(tokens)]
        np.testing.assert_allclose(result.logprobs[row], chosen, rtol=0, atol=error)
        ids, numbers = np.moveaxis(np.array(result.top_logprobs[row]), -1, 0)
        np.testing.assert_allclose(numbers, expected.topk(3).values, rtol=0, atol=error)
        named = expected.gather(1, torch.from_numpy(ids).long())
        np.testing.assert_allclose(numbers, named, rtol=0, atol=error)


def test_64_rows_are_the_rows_one_by_one(model):
    prompts = [random_tokens(1 + n % 16, seed=n).tolist() for n in range(64)]
    together = generate_tokens(model, prompts, max_new_tokens=8)
    alone = [generate_tokens(model, [p], max_new_tokens=8).tokens[0] for p in prompts]
    assert together.tokens == alone


def test_with_dynamic_rope_a_prompt_is_not_cut():
    _, model = make_pair("llama, dynamic rope past its length")
    with pytest.raises(InputError, match="with dynamic rope a prompt is one piece"):
        generate_tokens(model, PROMPTS, max_new_tokens=NEW, prefill_chunk=18)


def test_the_loop_ends_when_every_row_has_stopped(model):
    first = generate_tokens(model, PROMPTS, max_new_tokens=1).tokens
    result = generate_tokens(
        model, PROMPTS, max_new_tokens=NEW, stop_tokens=[row[0] for row in first]
    )
    assert result.tokens == [[], [], []]
    assert result.decoded_tokens == 0
    assert result.decode_tokens_per_second == 0.0


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(model):
    def draw(seed, prompts=PROMPTS, **options):
        return generate_tokens(
            model, prompts, max_new_tokens=NEW, temperature=1.0, top_p=0.9, seed=seed, **options
        ).tokens

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(5)[:1] == draw(5, PROMPTS[:1])
    assert draw(5) == draw(5, prefill_chunk=4)
    assert draw(5) == draw(5, stream=lambda new: None)


def test_top_k_of_one_is_greedy_at_any_temperature(model):
    hot = generate_tokens(model, PROMPTS, max_new_tokens=NEW, temperature=2.0, top_k=1)
    assert hot.tokens == generate_tokens(model, PROMPTS, max_new_tokens=NEW).tokens


def test_numbers_of_the_result_add_up(model):
    result = generate_tokens(model, PROMPTS, max_new_tokens=NEW)
    assert result.prompt_tokens == 29
    assert result.decoded_tokens == 3 * (NEW - 1)
    assert result.prefill_seconds > 0 and result.decode_seconds > 0
    assert result.decode_tokens_per_second == result.decoded_tokens / result.decode_seconds
    assert result.prefill_tokens_per_second == 29 / result.prefill_seconds


def test_one_new_token_needs_no_decoding(model):
    result = generate_tokens(model, PROMPTS, max_new_tokens=1)
    assert [len(row) for row in result.tokens] == [1, 1, 1]


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray, tuple, lambda p: list(jnp.asarray(p))])
def test_arrays_and_lists_of_numbers_are_prompts(model, kind):
    prompt = PROMPTS[0]
    expected = generate_tokens(model, [prompt], max_new_tokens=3).tokens
    for prompts in ([kind(prompt)], kind([prompt])):
        assert generate_tokens(model, prompts, max_new_tokens=3).tokens == expected


def test_nothing_goes_to_the_device_in_silence(model):
    """What comes back is read by `device_get` as well; on a CPU the guard cannot see that."""

    def generate(prompts=PROMPTS, **options):
        return generate_tokens(model, prompts, max_new_tokens=NEW, **options).tokens

    options = {"stop_tokens": [3], "logprobs": 2, "prefill_chunk": 4, "stream": lambda new: None}
    expected = generate(), generate(temperature=0.7, top_k=9, seed=2**32 - 1, **options)
    arrays = [jnp.asarray(prompt) for prompt in PROMPTS]
    with jax.transfer_guard("disallow"):
        assert generate(arrays) == expected[0]
        assert generate(temperature=0.7, top_k=9, seed=2**32 - 1, **options) == expected[1]


def test_lengths_are_rounded_up_by_at_most_a_quarter():
    assert [round_up(n) for n in (1, 16, 17, 100, 129, 1000)] == [16, 16, 32, 112, 160, 1024]
    lengths = {round_up(n) for n in range(1, 4097)}
    assert all(n <= round_up(n) <= max(16, math.ceil(1.25 * n) + 15) for n in range(1, 4097))
    assert len(lengths) == 28


@pytest.mark.parametrize(
    ("prompts", "options", "reason"),
    [
        ([], {}, "prompts: expected at least one, got none"),
        ([1, 2], {}, "prompts: expected a list of tokens for each, [[1, 2], [3]], got [1, 2]"),
        (["ab"], {}, "prompts: expected a list of tokens for each, [[1, 2], [3]], got ['ab']"),
        (jnp.ones((1, 2)), {}, "prompt 0: expected tokens 0 .. 127, got 1.0"),
        (
            jnp.arange(3),
            {},
            "prompts: expected a list of tokens for each, [[1, 2], [3]], got [0, 1",
        ),
        (np.int32(3), {}, "prompts: expected a list of tokens for each, [[1, 2], [3]], got"),
        (np.ones((1, 2, 2), int), {}, "prompt 0: expected tokens 0 .. 127, got [1, 1]"),
        (None, {}, "prompts: expected a list of tokens for each, [[1, 2], [3]], got None"),
        ([[1], []], {}, "prompt 1: empty, a model needs at least one token to continue"),
        ([[1, 128]], {}, "prompt 0: expected tokens 0 .. 127, got 128"),
        ([[-1]], {}, "prompt 0: expected tokens 0 .. 127, got -1"),
        ([[1.5]], {}, "prompt 0: expected tokens 0 .. 127, got 1.5"),
        ([[1] * 100], {}, "100 tokens and max_new_tokens = 33 are more than the 128"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected an integer of at least 1, got 0"),
        ([[1]], {"temperature": -0.1}, "temperature: expected a number of at least 0, got -0.1"),
        ([[1]], {"temperature": math.nan}, "temperature: expected a number of at least 0, got nan"),
        ([[1]], {"top_k": -1}, "top_k: expected an integer of at least 0 (off), got -1"),
        ([[1]], {"top_k": 2.0}, "top_k: expected an integer of at least 0 (off), got 2.0"),
        ([[1]], {"top_p": 0.0}, "top_p: expected a number above 0 and at most 1 (off), got 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p: expected a number above 0 and at most 1 (off), got 1.1"),
        ([[1]], {"seed": -1}, "seed: expected an integer from 0 to 2^32 - 1, got -1"),
        ([[1]], {"logprobs": 129}, "logprobs: expected an integer from 0 to 128, or None, got 129"),
        ([[1]], {"logprobs": True}, "logprobs: expected an integer from 0 to 128, or None"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk: expected an integer of at least 1, or None"),
        ([[1]], {"stop_tokens": ["end"]}, "stop_tokens: expected tokens, got 'end'"),
    ],
)
def test_what_cannot_be_generated_is_refused_with_the_reason(model, prompts, options, reason):
    with pytest.raises(InputError) as raised:
        generate_tokens(model, prompts, **{"max_new_tokens": NEW, **options})
    assert reason in str(raised.value)


def test_all_reasons_are_listed_at_once(model):
    with pytest.raises(InputError) as raised:
        generate_tokens(model, [[], [500]], max_new_tokens=-1, top_p=7)
    assert len(raised.value.reasons) == 4


def test_the_cache_has_the_models_dtype_and_room_for_every_token():
    model = convert(make_reference("llama"), dtype=jnp.bfloat16)
    options = decoding.make_options(0.0, 0, 1.0, 0, ())
    cache = start_rows(model, PROMPTS, options, NEW)[0].cache
    assert len(cache) == 2
    assert cache[0].k.shape == cache[1].v.shape == (3 * 2, 32 + 48, 16)
    assert cache[0].k.dtype == jnp.bfloat16
