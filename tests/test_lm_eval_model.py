"""The harness's command on a guarded model: what never fires changes nothing, what fires does; all are counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from conftest import SENTENCES
from saeguard.clamp import Clamp
from saeguard.errors import ArtifactError, AttachError, UsageError
from saeguard.gate import Density, Gate
from saeguard.lm_eval_model import GuardedLM
from tiny import hooks_on, with_rule

ROWS = [{"q": text, "options": text.split()[:3], "right": i % 3} for i, text in enumerate(SENTENCES)]
CHOICES = 3 * len(ROWS)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
doc_to_text: '{{{{q}}}}'
"""
GIVEN = """
output_type: multiple_choice
doc_to_choice: '{{options}}'
doc_to_target: '{{right}}'
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WRITTEN = """
output_type: generate_until
doc_to_target: '{{options[0]}}'
generation_kwargs:
  until: ["#"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer, guardrail) -> Path:
    """A model, two tasks, and guardrails that fire always and never."""
    found: Path = tmp_path_factory.mktemp("harness")
    llama.save_pretrained(found / "model")
    tokenizer.save_pretrained(found / "model")
    (found / "rows.json").write_text(json.dumps(ROWS), "utf-8")
    for name, kind in [("given", GIVEN), ("written", WRITTEN)]:
        (found / f"{name}.yaml").write_text(TASK.format(name=name, rows=found / "rows.json") + kind, "utf-8")
    strong = Clamp("dense", c=200.0, strength=20.0)
    with_rule(guardrail, threshold=-1.0, clamp=strong).save_pretrained(found / "always")
    with_rule(guardrail, threshold=2.0, clamp=strong).save_pretrained(found / "never")
    return found


def run(folder: Path, out: Path, model: str, args: str, *, batch: int = 4) -> tuple[dict[str, Any], list[Any]]:
    """The harness's command: its results, and what was answered to each document."""
    source = Path(__file__).parents[1] / "src"
    done = subprocess.run(
        [sys.executable, "-m", "saeguard.lm_eval_model", "--model", model, "--tasks", "given,written",
         "--model_args", f"pretrained={folder / 'model'}{args}", "--include_path", str(folder), "--device", "cpu",
         "--batch_size", str(batch), "--output_path", str(out), "--log_samples"],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(source), "HF_HOME": str(out), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = out.rglob("results_*.json")
    samples = [json.loads(line) for path in sorted(out.rglob("samples_*")) for line in path.read_text().splitlines()]
    return json.loads(results.read_text("utf-8")), [sample["resps"] for sample in samples]


def scores(results: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: v for key, v in row.items() if "," in key} for name, row in results["results"].items()}


def test_the_harness_scores_a_guarded_model_and_counts_verdicts(folder, tmp_path):
    plain, answers = run(folder, tmp_path / "plain", "hf", "")
    quiet, same = run(folder, tmp_path / "quiet", "saeguard", f",guardrail={folder / 'never'}")
    loud, others = run(folder, tmp_path / "loud", "saeguard", f",guardrail={folder / 'always'}")
    watched, watching = run(folder, tmp_path / "watched", "saeguard", f",guardrail={folder / 'always'},action=monitor")
    assert answers == same == watching
    assert scores(plain) == scores(quiet) == scores(watched)
    assert sum(a != b for a, b in zip(answers, others, strict=True)) > len(answers) / 2
    assert "saeguard" not in plain["config"]
    for results, fired in [(quiet, False), (loud, True), (watched, True)]:
        (count,) = results["config"]["saeguard"].values()
        assert count["triggered"] == count["read"] * fired
        assert len(ROWS) < count["read"] <= CHOICES + len(ROWS)


def test_a_guardrail_of_another_model_ends_the_command_with_a_message(folder, guardrail, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "saeguard.lm_eval_model", "--model", "saeguard", "--tasks", "given", "--model_args",
         f"pretrained={folder / 'model'},guardrail={tmp_path / 'nowhere'}", "--include_path", str(folder)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Artifact" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def scorer(folder: Path, llama: Any, tokenizer: Any, name: str, **options: Any) -> GuardedLM:
    return GuardedLM(llama, str(folder / name), tokenizer=tokenizer, **options)


def test_the_guardrail_goes_with_the_scorer(folder, llama, tokenizer):
    before = hooks_on(llama)
    closed = scorer(folder, llama, tokenizer, "never")
    assert hooks_on(llama) != before
    closed.close()
    assert hooks_on(llama) == before
    with pytest.raises(UsageError, match="action=halt"):
        scorer(folder, llama, tokenizer, "never", action="halt")
    with pytest.raises(ArtifactError):
        scorer(folder, llama, tokenizer, "nowhere")
    assert hooks_on(llama) == before


def test_padding_is_not_counted_and_a_gate_of_whole_texts_wants_none(folder, llama, tokenizer, guardrail, tmp_path):
    import torch

    rows = [tokenizer(text).input_ids for text in SENTENCES[:2]]
    width = max(map(len, rows)) + 30
    batch = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    found = scorer(folder, llama, tokenizer, "always")
    found._model_call(batch)
    found.close()
    assert dict(found.read) == dict(found.triggered) == {"topic": 2}
    with_rule(guardrail, gate=Gate(Density(), moment="block")).save_pretrained(tmp_path / "block")
    by_block = GuardedLM(llama, str(tmp_path / "block"), tokenizer=tokenizer)
    by_block._model_call(batch[:1, : len(rows[0])])
    with pytest.raises(AttachError, match="batch_size=1"):
        by_block._model_call(batch)
    by_block.close()
