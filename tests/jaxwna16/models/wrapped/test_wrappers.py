"""Where a whole keeps its text model: sections, what they inherit, names, and the head."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import transformers

from jaxwna16.errors import ModelError
from jaxwna16.models.families import TEXT_TYPES, find_family, parse_config
from jaxwna16.models.filling.fit import plan_model
from jaxwna16.models.filling.renaming import rename
from jaxwna16.models.filling.skipped import find_skipped, list_rules
from jaxwna16.models.wrapped.table import WRAPPERS
from loaders.plan import make_plan
from tests.jaxwna16.models.family_rows import SMALL
from tests.sparse import write_sparse

SIZES = {key: SMALL[key] for key in SMALL if key.endswith(("_size", "_heads", "_layers"))} | {
    "max_position_embeddings": 512,
    "head_dim": 16,
}
INNER = [(outer, text) for outer, wrapper in WRAPPERS.items() for text in wrapper.texts]


def make_config(outer: str, text: dict | None, **changes) -> dict:
    """A config.json whose section is `text`; None is a whole without one."""
    section = text
    for key in reversed(WRAPPERS[outer].path):
        section = {} if section is None else {key: section}
    return {"model_type": outer, **(section or {}), **changes}


def make_theirs(config: dict):
    """transformers' configuration of a config.json."""
    return transformers.AutoConfig.for_model(**copy.deepcopy(config))


@pytest.mark.parametrize(("outer", "text_type"), INNER)
def test_absent_keys_take_the_defaults_of_transformers(outer, text_type):
    text = {"model_type": text_type, **SIZES}
    saved = make_theirs(make_config(outer, text)).to_dict()
    ours, theirs = parse_config(make_config(outer, text)), parse_config(saved)
    assert [token for _, token in ours.media_tokens] == [token for _, token in theirs.media_tokens]
    # of the head, `test_the_head_is_the_embedding_where_transformers_says_so` says more
    rest = {"tie_word_embeddings": False, "is_tie_open": False, "media_tokens": ()}
    silent = {"dtype": None, "eos_token_ids": (), **rest}
    silent |= {"model_type": theirs.model_type}  # transformers saves Kimi's as deepseek_v3
    assert dataclasses.replace(ours, **silent) == dataclasses.replace(theirs, **silent)


@pytest.mark.parametrize("outer", WRAPPERS)
def test_each_text_model_is_of_a_family_and_the_first_where_the_section_is_silent(outer):
    texts = WRAPPERS[outer].texts
    assert set(texts) <= set(TEXT_TYPES)
    assert parse_config(make_config(outer, SIZES)).model_type == texts[0]


@pytest.mark.parametrize("outer", WRAPPERS)
def test_what_the_section_does_not_state_is_inherited(outer):
    stated = {"dtype": "bfloat16", "eos_token_id": [3, 4]}
    found = parse_config(make_config(outer, SIZES, **stated))
    assert (found.dtype, found.eos_token_ids) == ("bfloat16", (3, 4))
    own = {**SIZES, "torch_dtype": "float16", "eos_token_id": 5}
    found = parse_config(make_config(outer, own, **stated))
    assert (found.dtype, found.eos_token_ids) == ("float16", (5,))


@pytest.mark.parametrize("inner", [None, False, True])
@pytest.mark.parametrize("outer_word", [None, False, True])
@pytest.mark.parametrize("outer", [name for name, w in WRAPPERS.items() if len(w.path) == 1])
def test_the_head_is_the_embedding_where_transformers_says_so(outer, outer_word, inner):
    text_type = WRAPPERS[outer].texts[0]
    text = {"model_type": text_type, **SIZES} | ({} if inner is None else {_TIED: inner})
    beside = {} if outer_word is None else {_TIED: outer_word}
    config = make_config(outer, text, **beside)
    theirs = make_theirs(config).tie_word_embeddings
    ours = parse_config(config)
    assert (
        ours.tie_word_embeddings == theirs
        or ours.is_tie_open
        or (outer_word, inner)
        == (
            None,
            False,
        )
    )
    # what neither file nor class says is not guessed
    if outer_word is not None:
        assert ours.tie_word_embeddings == theirs


_TIED = "tie_word_embeddings"


@pytest.mark.parametrize("has_head", [False, True])
def test_where_config_json_is_silent_a_head_in_the_files_counts(has_head, tmp_path):
    layers = {"num_hidden_layers": 1, "intermediate_size": 64, "num_key_value_heads": 4}
    text = {"model_type": "mistral", **SIZES, **layers}
    shapes = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (64, 64)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (64, 64)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), (64, 64)),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (64,)),
    }
    tensors = {f"layers.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"embed_tokens.weight": (128, 64), "norm.weight": (64,)}
    tensors = {f"language_model.model.{name}": ("BF16", shape) for name, shape in tensors.items()}
    head = {"language_model.lm_head.weight": ("BF16", (128, 64))} if has_head else {}
    folder = write_sparse(tmp_path / "c", make_config("mistral3", text), [tensors | head])
    model = plan_model(make_plan(folder))
    assert (model.lm_head is not None) is has_head
    assert model.config.tie_word_embeddings is not has_head


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "qwen3_vl"}, "text_config: expected the configuration of the text model"),
        ({"model_type": "mistral3", "text_config": 3}, "text_config: expected the configuration"),
        (make_config("qwen3_5", {"hidden_act": "gelu"}), "text_config.hidden_act"),
        (make_config("qwen3_5", {"model_type": "llama"}), "text_config.model_type: expected one"),
        (make_config("qwen2_5_vl", None, hidden_size=0), "hidden_size: expected an integer"),
        (make_config("qwen3_vl", SIZES, image_token_id="x"), "image_token_id: expected an integer"),
        ({"model_type": "qwen3_vl_text", **SIZES}, "model_type: expected one of llama"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_whole_name(config, reason):
    with pytest.raises(ModelError) as raised:
        parse_config(config)
    assert raised.value.reasons[0].startswith(reason)


def test_the_text_models_keys_may_stand_outside_as_in_published_files():
    rope = {"type": "mrope", "mrope_section": [4, 2, 2]}
    flat = make_config("qwen2_5_vl", None, **SIZES, vision_config={}, rope_scaling=rope)
    inside = make_config("qwen2_5_vl", {**SIZES, "rope_scaling": rope})
    assert parse_config(flat) == parse_config(inside)
    assert parse_config(flat).rope.rope_type == "default"


SPELLINGS = {
    "qwen2_5_vl": ("model.", "model.language_model."),
    "qwen3_vl": ("model.language_model.",),
    "mistral3": ("language_model.model.", "model.language_model."),
    "internvl": ("language_model.model.", "model.language_model."),
    "llava_next": ("language_model.model.", "model.language_model."),
    "glm4v_moe": ("model.language_model.",),
    "qwen3_omni_moe": ("thinker.model.", "thinker.model.language_model."),
    "qwen3_omni_moe_thinker": ("model.", "thinker.model.", "model.language_model."),
}
"""What the names of layers begin with in published files, and as transformers 5 saves them."""


@pytest.mark.parametrize("outer", SPELLINGS)
def test_every_spelling_of_a_name_has_its_place(outer):
    names = find_family(make_config(outer, SIZES)).names
    for prefix in SPELLINGS[outer]:
        assert rename(f"{prefix}layers.3.mlp.up_proj", names) == "model.layers.3.mlp.up_proj"
        assert rename(f"{prefix}norm.weight", names) == "model.norm.weight"
    prefix = SPELLINGS[outer][0]
    head = f"{prefix.removesuffix('model.')}lm_head" if "language_model.m" in prefix else "lm_head"
    head = "thinker.lm_head" if prefix.startswith("thinker") else head
    assert rename(head, names) == rename("lm_head", names) == "lm_head"


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.0.attn.qkv.weight",
        "model.visual.deepstack_merger_list.0.norm.weight",
        "model.vision_tower.transformer.layers.0.attention.q_proj",
        "vision_tower.transformer.layers.0.attention.q_proj",
        "multi_modal_projector.linear_1",
        "thinker.visual.merger_list.0.mlp.0",
        "thinker.audio_tower.layers.0.fc1",
        "talker.model.layers.0.mlp.gate",
        "code2wav.decoder.0.conv.weight",
        "token2wav.code2wav_dit_model.norm_out.linear",
    ],
)
def test_what_is_beside_the_text_model_is_left_out(name):
    rules = list_rules(parse_config(make_config("qwen3_vl", SIZES)))
    assert find_skipped(rules, [name])
