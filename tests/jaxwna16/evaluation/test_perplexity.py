"""Perplexity against NumPy and torch, on a model small enough to read."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxwna16.errors import InputError, ModelError
from jaxwna16.evaluation.perplexity import measure_perplexity, read_text, relate_to_text
from jaxwna16.evaluation.text_windows import cut_windows
from tests.grids import cover

VOCABULARY = 37


class TinyModel(nnx.Module):
    """Logits from the mean of all embeddings so far: causal, and it sees its whole window."""

    traces = 0

    def __init__(self, seed: int = 0, dtype=jnp.float32):
        embedding, head = jax.random.split(jax.random.key(seed))
        self.embedding = nnx.Param(jax.random.normal(embedding, (VOCABULARY, 8), dtype) * 2)
        self.head = nnx.Param(jax.random.normal(head, (8, VOCABULARY), dtype))

    def __call__(self, tokens):
        TinyModel.traces += 1
        summed = jnp.cumsum(self.embedding[...][tokens], axis=1)
        counts = jnp.arange(1, tokens.shape[1] + 1, dtype=summed.dtype)
        return (summed / counts[None, :, None]) @ self.head[...]


@pytest.fixture
def model() -> TinyModel:
    return TinyModel()


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(0).integers(0, VOCABULARY, 20 * 16 + 9).tolist()


def compute_reference(model, tokens, window: int) -> float:
    """The mean negative log-likelihood of whole windows, in float64 from the model's own logits."""
    rows = np.asarray(tokens)[: len(tokens) // window * window].reshape(-1, window)
    logits = np.asarray(model(jnp.asarray(rows, jnp.int32)).astype(jnp.float32), np.float64)[:, :-1]
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    likelihood = exponents / exponents.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(likelihood, rows[:, 1:, None], -1)).mean()


@pytest.mark.parametrize(("window", "batch"), cover([2, 16, 50], [1, 3, 1000]))
def test_it_is_that_of_numpy(model, tokens, window, batch):
    found = measure_perplexity(model, tokens, window=window, batch=batch)
    expected = compute_reference(model, tokens, window)
    np.testing.assert_allclose(found.nll, expected, rtol=1e-6)
    np.testing.assert_allclose(found.perplexity, math.exp(expected), rtol=1e-5)
    assert found.windows == len(tokens) // window
    assert found.tokens == found.windows * (window - 1)
    assert found.tokens_per_second == found.tokens / found.seconds > 0


def test_it_is_that_of_torch(model, tokens):
    torch = pytest.importorskip("torch")
    rows = np.asarray(tokens[: 20 * 16]).reshape(20, 16)
    logits = torch.tensor(np.asarray(model(jnp.asarray(rows, jnp.int32))))[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), torch.tensor(rows[:, 1:]).reshape(-1)
    )
    found = measure_perplexity(model, tokens, window=16)
    np.testing.assert_allclose(found.nll, loss.item(), rtol=1e-6)


def test_low_precision_logits_are_normalised_in_float32(tokens):
    model = TinyModel(dtype=jnp.bfloat16)
    found = measure_perplexity(model, tokens, window=16)
    np.testing.assert_allclose(found.nll, compute_reference(model, tokens, 16), rtol=1e-6)


def test_limited_windows_are_the_first(model, tokens):
    for limit in (4, 3, 1, 20, 99):
        found = measure_perplexity(model, tokens, window=16, max_windows=limit)
        assert found.nll == measure_perplexity(model, tokens[: 16 * limit], window=16).nll
        assert found.windows == min(limit, 20)


def test_the_size_of_a_batch_does_not_matter(model, tokens):
    one = measure_perplexity(model, tokens, window=16)
    for batch in (2, 7, 20, 64):
        found = measure_perplexity(model, tokens, window=16, batch=batch)
        np.testing.assert_allclose(found.nll, one.nll, rtol=1e-7)
        assert (found.tokens, found.windows) == (one.tokens, one.windows)


def test_one_shape_is_traced_once_and_weights_are_arguments(tokens):
    before = TinyModel.traces
    first, second = (
        measure_perplexity(TinyModel(seed), tokens, window=10, batch=3) for seed in (0, 1)
    )
    assert TinyModel.traces == before + 1
    assert first.nll != second.nll
    np.testing.assert_allclose(second.nll, compute_reference(TinyModel(1), tokens, 10), rtol=1e-6)


def test_what_it_found_is_json(model, tokens):
    found = dataclasses.asdict(measure_perplexity(model, np.asarray(tokens), window=16))
    assert json.loads(json.dumps(found)) == found


def test_a_text_shorter_than_a_window_names_both_and_the_way_out(model):
    with pytest.raises(InputError, match=r"9 tokens.*window of 16.*--window"):
        measure_perplexity(model, list(range(9)), window=16)
    with pytest.raises(InputError, match="0 tokens"):
        measure_perplexity(model, [], window=16)


@pytest.mark.parametrize("size", [16, 17, 20, 31, 32, 47, 329])
@pytest.mark.parametrize("stride", [1, 5, 8, 15])
def test_with_a_stride_every_token_but_the_first_is_scored_once(size, stride):
    windows = cut_windows(np.arange(size), 16, None, stride)
    scored = windows.tokens[:, 1:][windows.mask()]
    assert sorted(scored.tolist()) == list(range(1, size))
    # each with as much context as the stride leaves: the first window's tokens have what there is
    for row, count in zip(windows.tokens[1:], windows.scored[1:], strict=True):
        assert 16 - count >= 16 - stride
        assert row.tolist() == list(range(row[0], row[0] + 16))


@pytest.mark.parametrize("stride", [3, 8, 15])
@pytest.mark.parametrize("batch", [1, 4])
def test_strided_windows_are_those_of_numpy(model, tokens, stride, batch):
    """The reference finds for each token the first window that holds it behind its first place."""
    found = measure_perplexity(model, tokens, window=16, stride=stride, batch=batch)
    starts = [*range(0, len(tokens) - 16 + 1, stride)]
    starts += [len(tokens) - 16] if starts[-1] + 16 < len(tokens) else []
    logits = np.asarray(
        model(jnp.asarray([tokens[start : start + 16] for start in starts], jnp.int32)), np.float64
    )
    likelihoods = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = []
    for place in range(1, len(tokens)):
        row = next(i for i, start in enumerate(starts) if start < place < start + 16)
        expected.append(-likelihoods[row, place - starts[row] - 1, tokens[place]])
    assert found.tokens == len(tokens) - 1
    assert found.windows == len(starts)
    np.testing.assert_allclose(found.nll, np.mean(expected), rtol=1e-6)


def test_a_stride_of_a_window_is_no_stride(model, tokens):
    plain = measure_perplexity(model, tokens, window=16)
    found = measure_perplexity(model, tokens, window=16, stride=16)
    assert (found.nll, found.tokens) == (plain.nll, plain.tokens)


def test_figures_by_word_and_byte_are_those_of_the_harness():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    tasks = pytest.importorskip("lm_eval.api.task")
    for text in ("Größe  und\nMaß", " It was\tso. "):
        counts = (tasks.PerplexityTask.count_words(text), tasks.PerplexityTask.count_bytes(text))
        found = relate_to_text(-12.5, text)
        assert (found.words, found.bytes) == counts
        assert found.word_perplexity == metrics.weighted_perplexity([(-12.5, counts[0])])
        assert found.byte_perplexity == metrics.weighted_perplexity([(-12.5, counts[1])])
        assert found.bits_per_byte == pytest.approx(metrics.bits_per_byte([(-12.5, counts[1])]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4, "stride": 5}, "from 1 to the window, 4 tokens, got 5"),
        ({"window": 4, "stride": 0}, "from 1 to the window, 4 tokens, got 0"),
        ({"window": 1}, "at least 2 tokens, got 1"),
        ({"window": 4, "batch": 0}, "batch must be at least 1"),
        ({"window": 4, "max_windows": 0}, "max_windows must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(model, tokens, options, message):
    with pytest.raises(InputError, match=message):
        measure_perplexity(model, tokens, **options)


@pytest.mark.parametrize("wrong", [[[1, 2], [3, 4]], [0.5, 1.5], [-1, 2], [2**40, 1]])
def test_tokens_that_are_not_ids_are_refused(model, wrong):
    with pytest.raises(InputError):
        measure_perplexity(model, wrong, window=2)


def test_likelihoods_that_are_not_finite_are_refused(model, tokens):
    with pytest.raises(ModelError, match=r"token 2 of window 0 \(id 37\)"):
        measure_perplexity(model, [1, 2, VOCABULARY, 3], window=4)
    model.head[...] = model.head[...] * jnp.inf
    with pytest.raises(ModelError, match="not finite"):
        measure_perplexity(model, tokens, window=16)


def test_a_text_is_read_without_its_byte_order_mark(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe")
    assert read_text(tmp_path / "text") == "Grüße"


def test_a_text_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin").write_bytes(b"Gr\xfc\xdfe")
    (tmp_path / "empty").touch()
    for name, message in [
        ("latin", "not UTF-8 text, byte 2"),
        ("empty", "empty"),
        ("missing", "No such file"),
        (".", "directory"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            read_text(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
