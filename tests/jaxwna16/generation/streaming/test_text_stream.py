"""Streams of every decoder there is: joined, they are the decoded text; stop strings match that."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxwna16.generation.streaming.stop_strings import StoppingText
from jaxwna16.generation.streaming.text_stream import TextStream
from jaxwna16.generation.text import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import decoders, models  # noqa: E402

WORDS = [
    *("a", "b", "ab", " ", "", "▁", "▁a", "▁▁", "a▁", "Ġa", "Ċ", "é", "Ã©", "▁Ã", "##b", "##", "."),
    *("a</w>", "</w>", "n't", "<pad>", "|", "<0x41>", "<0x20>", "<0xC3>", "<0xA9>", "<0xE2>"),
    *("<0x+A>", "<0xZZ>", "<0xa9>", "<s>", "<t>"),
]
SINGLE = [
    decoders.ByteLevel(),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Metaspace(),
    decoders.Metaspace("▁", "never"),
    decoders.WordPiece(),
    decoders.WordPiece("##", False),
    decoders.BPEDecoder(),
    decoders.CTC(),
    decoders.Replace("▁", " "),
    decoders.Replace("a", "bb"),
    decoders.Replace(tokenizers.Regex("a+"), "x"),
    decoders.Strip(" ", 1, 0),
    decoders.Strip(" ", 2, 0),
]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
CHAINS = st.one_of(
    st.none(),
    st.sampled_from(SINGLE),
    st.lists(st.sampled_from(SINGLE), max_size=4).map(decoders.Sequence),
    st.sampled_from([LLAMA, [*LLAMA, decoders.Strip(" ", 1, 0)], LLAMA[1:]]).map(decoders.Sequence),
    st.just(decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")])),
)
IDS = st.lists(st.integers(0, len(WORDS) + 1), max_size=12)


def make(decoder, *, again: bool = False) -> Tokenizer:
    """A tokenizer; `again`: its special token is added once more, as one that is not special."""
    backend = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    backend.add_special_tokens(["<s>"])
    backend.add_tokens(["<t>", *(["<s>"] if again else [])])
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend, frozenset(), {}, {}, "made")


@settings(max_examples=400, deadline=None)
@given(
    decoder=CHAINS,
    ids=IDS,
    cuts=st.lists(st.integers(0, 12), max_size=4),
    skip=st.booleans(),
    again=st.booleans(),
)
def test_joined_it_is_the_decoded_text(decoder, ids, cuts, skip, again):
    tokenizer = make(decoder, again=again)
    stream = TextStream(tokenizer, skip)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for _ in range(2):  # a new text may follow
        pieces = [stream.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
        assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids, skip)


def test_decoders_of_language_models_do_not_wait_for_the_end():
    for chain in ([decoders.ByteLevel()], LLAMA, [*LLAMA, decoders.Strip(" ", 1, 0)]):
        stream = TextStream(make(decoders.Sequence(chain)))
        assert not stream.is_whole and stream.push([WORDS.index("ab")]) == "ab"


@settings(max_examples=200, deadline=None)
@given(decoder=CHAINS, ids=IDS, stop=st.lists(st.text("ab x", min_size=1, max_size=3), max_size=2))
def test_a_stop_string_is_one_of_the_decoded_text(decoder, ids, stop):
    """The first tokens whose text has one are those that end it, whatever the decoder does."""
    tokenizer = make(decoder)
    row = StoppingText(tokenizer, stop)
    pieces = [row.push([token]) for token in ids]
    pieces.append(row.flush())
    whole = [tokenizer.decode(ids[: end + 1]) for end in range(len(ids))]
    ended = [i for i, text in enumerate(whole) if any(s in text for s in stop)]
    assert "".join(pieces) == row.text
    if not row.stopped:
        assert row.text == tokenizer.decode(ids) and not ended
    elif TextStream(tokenizer).is_whole:
        text = whole[ended[0]]
        assert row.tokens == ended[0] + 1
        assert any(text.startswith(row.text + s) for s in stop)
        assert not any(s in row.text for s in stop)
    else:
        assert any(tokenizer.decode(ids).startswith(row.text + s) for s in stop)
