"""Links that leave the folder, as in older `local_dir` downloads: followed on request."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxwna16
from tests.jaxwna16.cli.test_bad_input import list_calls

PROMPT = ("--prompt", "A dark night", "--max-new-tokens", 12, "--json")
"""As in `test_generate`, for the sake of its programs."""


def link_folder(folder, place):
    """A folder of links, beside a cache that holds the files under other names."""
    cache, linked = place / "blobs", place / "linked"
    cache.mkdir()
    linked.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        (cache / str(i)).write_bytes(path.read_bytes())
        (linked / path.name).symlink_to(cache / str(i))
    return linked


@pytest.fixture
def linked(packed_folder, tmp_path):
    return link_folder(packed_folder, tmp_path)


def test_without_being_asked_no_verb_follows_them_and_each_says_how(call, linked):
    made = linked.parent / "made"
    for argv in [*list_calls(linked), ["convert", linked, made]]:
        outcome = call(*argv)
        assert (outcome.code, outcome.out) == (1, "")
        assert "config.json: the file is a link that leaves the checkpoint folder" in outcome.err
        assert "pass follow_links=True, on the command line --follow-links" in outcome.err
        assert not made.exists()


def test_what_is_followed_gives_the_same_numbers(call, linked, packed_folder, float_folder):
    assert call("inspect", linked, "--follow-links").code == 0
    assert call("verify", linked, "--follow-links").code == 0
    expected = jaxwna16.load_checkpoint(packed_folder).params
    found = jaxwna16.load_checkpoint(linked, follow_links=True).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    texts = [
        call("generate", *argv, *PROMPT).report["texts"]
        for argv in ([linked, "--follow-links"], [packed_folder])
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("verb", ["convert", "dequantize", "quantize"])
def test_copies_of_linked_folders_hold_files(
    call, linked, packed_folder, float_folder, tmp_path, verb
):
    original = packed_folder
    if verb == "quantize":
        (tmp_path / "floats").mkdir()
        original, linked = float_folder, link_folder(float_folder, tmp_path / "floats")
    options = ["--group-size", 32] if verb == "quantize" else []
    made = [tmp_path / "made", tmp_path / "expected"]
    assert call(verb, linked, made[0], *options, "--follow-links").code == 0
    assert call(verb, original, made[1], *options).code == 0
    names = [sorted(path.name for path in folder.iterdir()) for folder in made]
    assert names[0] == names[1]
    assert not any(path.is_symlink() for path in made[0].iterdir())
    for name in names[0]:
        if not name.endswith("jaxwna16.json"):  # which names the source
            assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


def test_a_link_to_what_is_no_file_is_refused_though_followed(call, linked):
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to("/dev/zero")
    outcome = call("verify", linked, "--follow-links")
    assert outcome.code == 1
    assert "model.safetensors: this is not a file" in outcome.err
