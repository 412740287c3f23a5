"""The command as a whole: calls, exit codes, pipes."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

import jaxwna16
from jaxwna16.cli import inspect

VERBS = ("inspect", "verify", "generate", "eval", "quantize", "dequantize", "bench", "doctor")


def test_help_names_every_verb(call):
    outcome = call("--help")
    assert outcome.code == 0
    assert all(verb in outcome.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(call, verb):
    outcome = call(verb, "--help")
    assert outcome.code == 0
    assert f"usage: jaxwna16 {verb}" in outcome.out


def test_the_version_is_printed(call):
    assert call("--version").out == f"jaxwna16 {jaxwna16.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [[], ["convert"], ["inspect"], ["inspect", "a", "--colour"], ["eval"], ["generate", "a"]],
    ids=" ".join,
)
def test_a_wrong_call_is_exit_code_2_with_the_usage(call, argv):
    outcome = call(*argv)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "usage: jaxwna16" in outcome.err


def test_ctrl_c_is_exit_code_130(call, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupt)
    outcome = call("inspect", "anything")
    assert outcome.code == 130
    assert outcome.err == "interrupted\n"


@pytest.mark.parametrize(
    "module",
    ["argparse", "jaxwna16.cli.arguments", "numpy", "jax._src.config", "jax.numpy"],
)
def test_ctrl_c_while_modules_are_imported_is_exit_code_130(packed_folder, module):
    """-X importtime says on stderr which module has just been imported; others follow each."""
    # a job in the background of a shell inherits that SIGINT is ignored
    handle = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{handle}; from jaxwna16.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-X", "importtime", "-c", script, "inspect", packed_folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.decode().rpartition("|")[2].strip() == module:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    said = [line for line in err.splitlines() if not line.startswith(b"import time:")]
    assert (process.returncode, said, out) == (130, [b"interrupted"], b"")


def test_what_an_interrupt_does_is_left_to_who_has_decided_it(call):
    calls = []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        assert call("--version").code == 0
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [1]
    assert call("--version").code == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_leaves_early_is_no_error(packed_folder):
    command = [sys.executable, "-m", "jaxwna16", "inspect", str(packed_folder), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_what_the_terminal_cannot_write_is_escaped(packed_folder, tmp_path):
    folder = tmp_path / "gr\u00fcn"
    folder.symlink_to(packed_folder)
    command = [sys.executable, "-m", "jaxwna16", "inspect", str(folder)]
    done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert b"gr\\xfcn" in done.stdout
