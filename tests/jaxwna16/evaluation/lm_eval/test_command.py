"""`jaxwna16 lm-eval` on local tasks of every kind, beside the harness's own model `hf`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxwna16.cli.main import main
from jaxwna16.lm_eval import JaxWNA16LM

ROOT = Path(__file__).parents[4]
TASKS = ("persuasion", "persuasion_choice", "persuasion_continue")
LIMIT = 8
# runs the command on a machine on which these packages are not installed
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in {missing}
        return None if missing else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
if {own_tasks}:
    from lm_eval.tasks import TaskManager
    TaskManager.__init__.__defaults__ = (None, None, False, None)  # without include_defaults
from jaxwna16.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


class Run(NamedTuple):
    """What the harness has written: its results, and the responses of each task by document."""

    results: dict[str, Any]
    responses: dict[str, list[Any]]
    output: str


def run_harness(
    tmp_path: Path, *arguments: str, missing: tuple[str, ...] = (), own_tasks: bool = False
) -> Run:
    """Run the command in a process of its own, offline, with all its files in `tmp_path`.

    With `own_tasks` the harness does not read its 14,000 task files, which takes 7 s.
    """
    hub = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")}
    environment = {
        **os.environ,
        **hub,
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    script = WITHOUT.replace("{missing}", repr(missing)).replace("{own_tasks}", repr(own_tasks))
    command = [sys.executable, "-c", script, "lm-eval", *arguments]
    command += ["--include_path", "examples/lm_eval_tasks", "--tasks", ",".join(TASKS)]
    command += ["--limit", str(LIMIT), "--batch_size", "8", "--device", "cpu"]
    command += ["--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [results] = tmp_path.glob("*/results_*.json")
    responses = {}
    for task in TASKS:
        [samples] = tmp_path.glob(f"*/samples_{task}_2*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        responses[task] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return Run(json.loads(results.read_text()), responses, done.stdout)


@pytest.fixture(scope="module")
def ours(folder, tmp_path_factory) -> Run:
    """Torch and transformers cannot be imported there."""
    return run_harness(
        tmp_path_factory.mktemp("ours"),
        "--model_args",
        f"pretrained={folder},dtype=float32",
        missing=("torch", "transformers", "accelerate"),
    )


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory) -> Run:
    return run_harness(
        tmp_path_factory.mktemp("theirs"),
        *("--model", "hf", "--model_args", f"pretrained={folder},dtype=float32"),
        own_tasks=True,
    )


def test_log_likelihoods_of_whole_texts_are_those_of_hf(ours, theirs):
    found, expected = (
        [
            float(doc[0][0] if isinstance(doc[0], list) else doc[0])
            for doc in run.responses["persuasion"]
        ]
        for run in (ours, theirs)
    )
    assert len(found) == LIMIT
    assert min(expected) < -1000  # one text at least is several windows long
    assert found == pytest.approx(expected, abs=1e-3)


def test_log_likelihoods_of_choices_are_those_of_hf(ours, theirs):
    found, expected = (
        [choice[0] for doc in run.responses["persuasion_choice"] for choice in doc]
        for run in (ours, theirs)
    )
    assert len(found) == 4 * LIMIT
    assert [float(score) for score, _ in found] == pytest.approx(
        [float(score) for score, _ in expected], abs=1e-3
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_generated_texts_are_those_of_hf(ours, theirs):
    texts = [text for [[text]] in ours.responses["persuasion_continue"]]
    assert texts == [text for [[text]] in theirs.responses["persuasion_continue"]]
    assert len(set(texts)) > 1
    assert not any("." in text or "\n" in text for text in texts)  # `until`


def test_figures_are_those_of_hf_to_four_digits(ours, theirs):
    for task in TASKS:
        found, expected = (run.results["results"][task] for run in (ours, theirs))
        assert found.keys() == expected.keys()
        for metric, value in expected.items():
            if isinstance(value, float):
                assert found[metric] == pytest.approx(value, rel=1e-4), (task, metric)


def test_the_harness_prints_its_own_table_and_names_our_model(ours):
    assert ours.output.startswith("jaxwna16 ({'pretrained': ")
    assert "|word_perplexity|" in ours.output
    assert ours.results["config"]["model"] == "jaxwna16"
    assert ours.results["config"]["model_dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "completed"),
    [
        (["--tasks", "a"], ["run", "--model", "jaxwna16", "--tasks", "a"]),
        (["run", "-t", "a"], ["run", "--model", "jaxwna16", "-t", "a"]),
        (["--model=hf", "-t", "a"], ["run", "--model=hf", "-t", "a"]),
        (["-M", "hf"], ["run", "-M", "hf"]),
        (["-Mhf"], ["run", "-Mhf"]),
        (["--config", "a.yaml"], ["run", "--config", "a.yaml"]),
        (["--config=a.yaml"], ["run", "--config=a.yaml"]),
        (["-C", "a.yaml"], ["run", "-C", "a.yaml"]),
        (["ls", "tasks"], ["ls", "tasks"]),
        (["--json", "-V"], ["run", "--model", "jaxwna16", "--json", "-V"]),
    ],
)
def test_all_arguments_go_to_the_harness(monkeypatch, arguments, completed):
    seen = []
    before = list(sys.argv)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.extend(sys.argv[1:]))
    assert main(["lm-eval", *arguments]) == 0
    assert seen == completed
    assert sys.argv == before


def test_a_faulty_input_is_an_error_and_no_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: JaxWNA16LM(str(tmp_path)))
    assert main(["lm-eval", "--tasks", "a"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")


def test_a_missing_harness_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["lm-eval", "--tasks", "a"]) == 1
    assert 'pip install "jaxwna16[eval]"' in " ".join(capsys.readouterr().err.split())


def test_the_harness_judges_its_own_arguments(capsys):
    assert main(["lm-eval", "--no-such-option", "1"]) == 2
    assert "--no-such-option" in " ".join(capsys.readouterr().err.split())
    assert main(["lm-eval", "run", "--help"]) == 0
    assert "--num_fewshot" in capsys.readouterr().out
