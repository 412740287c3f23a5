"""The table tells whose failure it was, and with which settings."""

from __future__ import annotations

from tests.writers.check import Outcome
from tests.writers.orders import CALIBRATED, NEAREST, SETTINGS, list_settings
from tests.writers.sources import NAMES
from tests.writers.table import Key, describe, fold, name_settings, shorten

GOOD = Outcome(modules=14, difference=2e-6, names=frozenset({"a.N.q_proj", "a.N.k_proj"}))
VERSIONS = {"AutoRound": {"auto-round": "0.16.1"}, "GPTQModel": {"gptqmodel": "7.7.0"}}


def test_every_family_and_the_real_model_are_asked_for():
    from jaxwna16.models.families import MODEL_TYPES
    from jaxwna16.models.wrapped.table import WRAPPERS

    thinkers = {name for name, w in WRAPPERS.items() if w.path[0] == "thinker_config"}
    # their own rows are asked for; and transformers has no model of the last one's name
    assert set(NAMES) == {"SmolLM2", *MODEL_TYPES} - thinkers - {"kimi_k2"}


def test_failures_of_a_writer_are_no_faults_of_ours_and_are_counted_apart():
    ours = Outcome(our_error="logits differ by 1.0e-02 of the largest", modules=13)
    theirs = Outcome(writer_error="KeyError: 'olmo2'")
    report = describe(
        {
            Key("llama", "AutoRound"): dict.fromkeys(SETTINGS, GOOD) | {SETTINGS[0]: ours},
            Key("olmo2", "GPTQModel"): dict.fromkeys(SETTINGS, theirs),
        },
        VERSIONS,
        "30 November 2026",
        minutes=5,
    )
    assert "| llama | AutoRound | 8 of 8 | 7 | 111 | 2.0e-06 |" in report
    assert "| olmo2 | GPTQModel | 0 of 8 | 0 | 0 |  |" in report
    assert "- jaxwna16 fails at llama (W4A16_ASYM groups nearest): `AutoRound: logits" in report
    assert "- GPTQModel fails at olmo2 (all): `KeyError: 'olmo2'`" in report
    assert "| llama | AutoRound | `a.N.{k_proj,q_proj}` |" in report


def test_settings_that_share_a_property_are_named_by_it():
    groups = [s for s in SETTINGS if s.symmetric and not s.channel]
    assert name_settings([s for s in SETTINGS if s.channel], SETTINGS) == "channel"
    assert name_settings(groups, SETTINGS) == "W4A16 groups"
    assert name_settings([SETTINGS[0], SETTINGS[-1]], SETTINGS).startswith(
        "2 of 8, such as W4A16_ASYM"
    )
    two = list_settings("olmo2")
    assert name_settings(two, two) == "all"
    assert name_settings(two[:1], two) == "W4A16_ASYM groups nearest"


def test_settings_of_every_model_hold_both_methods():
    assert {s.method for s in list_settings("olmo2")} == {NEAREST, CALIBRATED}
    assert [s.method for s in list_settings("llava")] == [CALIBRATED]
    assert list_settings("mixtral") == SETTINGS


def test_a_message_is_one_short_line_without_paths():
    assert shorten("no `file` /tmp/xyz/model/config.json | x") == "no 'file' …/config.json / x"
    assert len(shorten("word " * 100)) <= 160
    assert fold(frozenset({"a.b"})) == "`a.b`"
