"""The harness's model of ours beside its own `hf`, method by method."""

from __future__ import annotations

import dataclasses
import json

import pytest
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from jaxwna16.errors import InputError
from jaxwna16.evaluation.lm_eval.batches import BatchSize, pad_length, read_batch_size
from jaxwna16.evaluation.lm_eval.options import read_flag
from jaxwna16.evaluation.lm_eval.scoring import _pad as scoring_pad
from jaxwna16.evaluation.perplexity import measure_perplexity, read_text
from jaxwna16.generation.tokens import generate_tokens
from jaxwna16.lm_eval import JaxWNA16LM
from tests.jaxwna16.evaluation.lm_eval.conftest import TEXT

TEXTS = (
    "Sir Walter Elliot",
    " Sir Walter Elliot",
    "",
    "<s>Sir Walter",
    "</s> of Kellynch Hall",
    "Größe \N{SNOWMAN}\n\n  two  spaces ",
)
PAIRS = (
    ("Sir Walter", " Elliot, of Kellynch"),
    ("Sir Walter ", "Elliot"),
    ("Sir Walter \n ", " Elliot"),
    ("Sir Wal", "ter Elliot"),
    ("<s>Sir", " Walter"),
    ("a", "\N{SNOWMAN}"),
)


@pytest.fixture(scope="module")
def make_model(folder):
    """A model with other options; the weights are loaded once."""
    loaded = JaxWNA16LM(str(folder), dtype="float32", batch_size="auto")

    def make(**options) -> JaxWNA16LM:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "jaxwna16.evaluation.lm_eval.model.load_model", lambda *_, **__: loaded.model
            )
            return JaxWNA16LM(str(folder), **{"batch_size": "auto", **options})

    return make


def make_hf(folder, **options) -> HFLM:
    """`hf` without its weights: what turns text into tokens."""
    twin = object.__new__(HFLM)
    twin.add_bos_token = options.get("add_bos_token")
    twin.custom_prefix_token_id = options.get("prefix_token_id")
    twin.chat_template_args = {}
    twin.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    return twin


@pytest.fixture(scope="module")
def make_whole_hf(folder):
    """`hf` with its weights, which are loaded once."""
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def make(**options) -> HFLM:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return HFLM(pretrained=weights, tokenizer=tokenizer, **options)

    return make


def ask(*arguments) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize(
    "options", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 1}]
)
def test_texts_become_the_tokens_of_hf(make_model, folder, options):
    model, twin = make_model(**options), make_hf(folder, **options)
    assert model.prefix_token_id == twin.prefix_token_id
    assert model.eot_token_id == twin.eot_token_id
    for text in TEXTS:
        for special in (None, True, False):
            expected = twin.tok_encode(text, add_special_tokens=special)
            assert model.tok_encode(text, add_special_tokens=special) == expected, (text, special)
    for pair in PAIRS:
        assert model._encode_pair(*pair) == twin._encode_pair(*pair), pair


@pytest.mark.parametrize(
    ("given", "flag"),
    [("True", True), ("false", False), ("None", None), (1, True), (0, False), (None, None)],
)
def test_a_bool_may_come_as_a_word(given, flag):
    assert read_flag("enable_thinking", given) is flag


def test_blanks_without_a_bos_stand_after_the_prefix_token(make_model, make_whole_hf):
    """`hf` fails there; what it says of the same text after an empty context is the value."""
    model = make_model(add_bos_token="False")
    pairs = [(" ", "Sir Walter Elliot"), ("\n", "b"), (" ", "A")]
    whole = [ask("", context + continuation) for context, continuation in pairs]
    expected = make_whole_hf(add_bos_token=False).loglikelihood(whole, disable_tqdm=True)
    for requests in (whole, [ask(*pair) for pair in pairs]):
        found = model.loglikelihood(requests, disable_tqdm=True)
        assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    with pytest.raises(InputError, match="request 1: the context has no tokens"):
        model._loglikelihood_tokens([(None, [0], [5]), (None, [], [5, 6])], disable_tqdm=True)
    with pytest.raises(InputError, match="request 0: context and continuation are empty"):
        model.loglikelihood([ask("", "")], disable_tqdm=True)


def test_a_bos_is_added_where_the_tokenizer_itself_adds_none(make_model, folder):
    model = make_model(add_bos_token=True)
    model.tokenizer.backend.post_processor = None
    assert model.tok_encode("Sir Walter") == make_hf(folder).tok_encode("Sir Walter")
    model.tokenizer = dataclasses.replace(model.tokenizer, special_tokens={"bos_token": "<none>"})
    assert model.tok_encode("Sir Walter") == make_hf(folder).tok_encode("Sir Walter")[1:]


@pytest.mark.parametrize("answer", ["Anne</s>Anne", "x ", "x\n", "s", ""])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_become_the_text_of_hf(make_model, folder, add_generation_prompt, answer):
    model, twin = make_model(), make_hf(folder)
    chat = [
        {"role": "system", "content": "Be brief."},  # which the template refuses
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": answer},
    ]
    found = model.apply_chat_template(chat, add_generation_prompt)
    assert found == twin.apply_chat_template(chat, add_generation_prompt)
    assert model.chat_template(True) == twin.chat_template(True)
    assert model.chat_template(False) is None
    with pytest.raises(InputError, match="'tool_use'"):
        model.chat_template("tool_use")


@pytest.mark.parametrize(
    "options",
    [
        {"enable_thinking": False},
        {"enable_thinking": True, "think_end_token": "</think>"},
        {"chat_template_args": {"enable_thinking": False, "style": "terse "}},
        {
            "chat_template_args": {"enable_thinking": True, "bos_token": ""},
            "enable_thinking": False,
        },
    ],
)
def test_the_chat_template_sees_what_that_of_hf_sees(make_model, make_whole_hf, options):
    chat = [{"role": "user", "content": "Who?"}]
    expected = make_whole_hf(**options).apply_chat_template(chat)
    words = {name: str(x) if type(x) in (bool, int) else x for name, x in options.items()}
    if "chat_template_args" in options:
        words["chat_template_args"] = json.dumps(options["chat_template_args"])
    models = [make_model(**options), make_model(**words)]
    assert [model.apply_chat_template(chat) for model in models] == [expected] * 2
    assert models[0].tokenizer_name != make_model().tokenizer_name


def test_the_answer_follows_the_thinking_as_in_hf(make_model, make_whole_hf):
    request = ask("Sir", {"max_gen_toks": 24})
    [whole] = make_model().generate_until([request], disable_tqdm=True)
    tokens = make_model().tokenizer.encode(whole, add_special_tokens=False)
    ends = (whole[9:11], tokens[len(tokens) // 2], "not there")
    for end in ends:
        expected = make_whole_hf(think_end_token=end).generate_until([request], disable_tqdm=True)
        model = make_model(think_end_token=end, enable_thinking=True)
        assert model.generate_until([request], disable_tqdm=True) == expected
        assert (expected == [whole]) == (end == "not there")
    # a stop string in the thinking is none, and one in the answer ends it
    answer = whole.split(ends[0])[-1].lstrip()
    stops = [whole[2:4], answer[3:]]
    assert stops[0] not in answer
    model = make_model(think_end_token=ends[0])
    stopped = ask("Sir", {"max_gen_toks": 24, "until": stops})
    assert model.generate_until([stopped], disable_tqdm=True) == [answer[:3]]
    # texts omit special tokens, so that the text of one would never be found
    assert make_model(think_end_token="</s>").think_end_token == 1


def test_a_model_that_thinks_is_not_asked_for_choices(make_model):
    model = make_model(enable_thinking="true", think_end_token="7")
    assert model.think_end_token == 7
    with pytest.raises(InputError, match="generative tasks alone"):
        model.loglikelihood([ask("a", "b")], disable_tqdm=True)


def test_eval_perplexity_cuts_a_text_as_the_harness_does(make_model):
    model = make_model(add_bos_token=False)
    text = read_text(TEXT)[5000:6700]
    [expected] = model.loglikelihood_rolling([ask(text)], disable_tqdm=True)
    tokens = [model.prefix_token_id, *model.tok_encode(text)]
    assert len(tokens) % 256 > 1  # the last window reaches back
    found = measure_perplexity(model.model, tokens, window=257, stride=256, batch=2)
    assert found.windows > 2
    assert -found.nll * found.tokens == pytest.approx(expected, abs=1e-3)


def test_requests_that_differ_in_the_last_token_alone_are_read_once(make_model, monkeypatch):
    model = make_model(max_length=64)
    requests = [
        ask("Which of them?", " A"),
        ask("Which of them?", " B"),
        ask("Which of", " them? C"),
        ask("", "Sir Walter"),
        ask("Sir Walter " * 40, "Elliot"),
    ]
    shapes = []

    def pad(rows, *shape):
        shapes.append((len(rows), *shape))
        return scoring_pad(rows, *shape)

    monkeypatch.setattr("jaxwna16.evaluation.lm_eval.scoring._pad", pad)
    together = model.loglikelihood(requests, disable_tqdm=True)
    assert shapes == [(3, 4, 64, 4)]
    alone = [model.loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    scores, expected = ([score for score, _ in found] for found in (together, alone))
    assert scores == pytest.approx(expected, abs=1e-4)
    assert len(set(scores)) == len(scores)


def test_the_models_warnings_are_logged(make_model, folder, monkeypatch, caplog):
    monkeypatch.setattr(make_model().model, "warnings", ("repetition_penalty is not applied",))
    make_model()
    assert f"{folder}: repetition_penalty is not applied" in caplog.text


def test_what_is_greedy_is_said(make_model):
    model = make_model()
    prompt = model.tok_encode("Sir")
    [[best, *_]] = generate_tokens(model.model, [prompt], max_new_tokens=24).tokens
    [(_, yes), (_, no)] = model._loglikelihood_tokens(
        [(None, prompt, [token]) for token in (best, best ^ 1)], disable_tqdm=True
    )
    assert yes
    assert not no


def test_texts_end_before_the_first_stop_string(make_model):
    model = make_model()
    whole = model.generate_until([ask("Sir", {"max_gen_toks": 24})], disable_tqdm=True)[0]
    stop = whole[8:10]
    requests = [
        ask("Sir", {"max_gen_toks": 24, "until": [stop, whole[20:]]}),
        ask("Sir", {"max_gen_toks": 24, "until": "never to be found"}),
    ]
    found = model.generate_until(requests, disable_tqdm=True)
    assert found == [whole[: whole.index(stop)], whole]


def test_draws_differ_between_repeats_and_are_the_same_in_another_run(make_model):
    request = ask("Sir", {"max_gen_toks": 24, "do_sample": True, "temperature": 1.0})
    runs = []
    for _ in range(2):
        model = make_model(batch_size=1, seed=3)
        runs.append(model.generate_until([request, request], disable_tqdm=True))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": "abc"}, "from 1 to 256, got 'abc'"),
        ({"max_length": -5}, "from 1 to 256, got -5"),
        ({"max_length": 257}, "from 1 to 256, got 257; or leave it out"),
        ({"max_gen_toks": "x"}, "of at least 1"),
        ({"prefix_token_id": "x"}, "from 0 to 399"),
        ({"prefix_token_id": 400}, "from 0 to 399"),
        ({"max_batch_size": -1}, "of at least 1"),
        ({"seed": 1.5}, "from 0 to 2147483647"),
        ({"add_bos_token": "maybe"}, "expected a bool"),
        ({"enable_thinking": []}, "expected a bool"),
        ({"enable_thinking": True}, "needs think_end_token="),
        ({"think_end_token": 400}, "from 0 to 399"),
        ({"chat_template_args": "style=x"}, "expected an object"),
        ({"chat_template_args": {"messages": []}}, "messages cannot be among them"),
    ],
)
def test_model_args_out_of_range_are_refused_before_the_weights_are_read(
    folder, monkeypatch, options, message
):
    monkeypatch.setattr("jaxwna16.evaluation.lm_eval.model.load_model", None)
    with pytest.raises(InputError, match=f"model_args: {next(iter(options))}\\b.*{message}"):
        JaxWNA16LM(str(folder), **options)


def test_what_we_do_not_have_is_refused_by_name(make_model, folder):
    with pytest.raises(InputError, match="has no peft, quantized"):
        JaxWNA16LM(str(folder), quantized=True, peft="x")
    with pytest.raises(InputError, match="dtype must be float32"):
        JaxWNA16LM(str(folder), dtype="fp16")
    model = make_model()
    with pytest.raises(InputError, match="has no num_beams"):
        model.generate_until([ask("Sir", {"num_beams": 4})], disable_tqdm=True)
    with pytest.raises(InputError, match="max_gen_toks=256 leaves no room"):
        model.generate_until([ask("Sir", {})], disable_tqdm=True)
    with pytest.raises(InputError, match="continuation has 0 tokens"):
        model._loglikelihood_tokens([(None, [5], [])], disable_tqdm=True)
    for wrong in ("many", 0, -1):
        with pytest.raises(InputError, match="batch_size"):
            read_batch_size(wrong)


def test_batches_have_few_shapes_and_hold_every_row():
    lengths = sorted((length % 301 + 1 for length in range(0, 9000, 7)), reverse=True)
    for size, most in ((None, 64), (None, 8), (5, 64)):
        batches = list(BatchSize(size, most, 50000, 301).plan(lengths))
        assert [batch.start for batch in batches] == [0, *(batch.stop for batch in batches[:-1])]
        assert batches[-1].stop == len(lengths)
        assert len({(batch.rows, batch.slots) for batch in batches}) <= 10
        for batch in batches:
            assert batch.stop - batch.start <= batch.rows <= most
            assert lengths[batch.start] <= batch.slots <= max(16, lengths[batch.start] * 1.5)
            assert batch.slots <= 301
            assert size or batch.rows == 1 or batch.rows * batch.slots * 50000 * 4 <= 2**29
    assert [pad_length(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 64)] == [
        *(16, 16, 24, 24, 32, 48, 48, 64, 64)
    ]
