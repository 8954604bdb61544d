"""The artifact: save and load bring everything back; damage and mismatch meet a named error; merging."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_guardrail, make_model, make_sae, make_tokenizer
from saeguard import folders as module
from saeguard.artifact import CARD_FILE, FORMAT_VERSION, JSON_FILE, TENSOR_FILE
from saeguard.clamp import Clamp
from saeguard.errors import (
    ArtifactDamagedError,
    ArtifactError,
    ArtifactMismatchError,
    ArtifactVersionError,
    GuardrailError,
    LayerError,
    MergeError,
)
from saeguard.gate import Cusum, Density, Evidence, Gate, Mean, Probe
from saeguard.guardrail import Guardrail, merge
from saeguard.rule import Rule

N = 6
EVIDENCE = Evidence(torch.linspace(-1, 2, N), -0.125)
RULES: dict[str, dict[str, Any]] = {
    "density": {},
    "evidence": {"gate": Gate(EVIDENCE, Cusum(0.75)), "threshold": 3.25, "action": "refuse"},
    "probe": {
        "gate": Gate(Probe(torch.linspace(-1, 1, 32), 0.5), Mean(), latch=False),
        "clamp": Clamp("active", 7.5, 2.0),
    },
    "paper": {"gate": Gate(Density(), Mean(), "block", "attended"), "action": "monitor", "name": "bio"},
}


def by_parts(value: Any) -> Any:
    """A value that compares equal when all tensors in it have equal bits."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, Guardrail | Rule) or hasattr(value, "__dataclass_fields__"):
        return type(value).__name__, {name: by_parts(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return {name: by_parts(part) for name, part in value.items()}
    return [by_parts(part) for part in value] if isinstance(value, tuple | list) else value


def change_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Alter guardrail.json and give it a digest that fits: what a forger, or another version, writes."""
    content = json.loads((folder / JSON_FILE).read_text("utf-8"))
    del content["sha256"]
    change(content)
    (folder / JSON_FILE).write_text(module.canonical(content | {"sha256": module._digest(content)}), "utf-8")


@pytest.fixture
def saved(guardrail, tmp_path) -> Path:
    """A saved guardrail."""
    return guardrail.save_pretrained(tmp_path / "guard")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_saved_and_loaded_is_the_same(llama, tokenizer, tmp_path, rule, activation):
    made = make_guardrail(llama, tokenizer, make_sae(activation), 2, **RULES[rule])
    found = Guardrail.from_pretrained(made.save_pretrained(tmp_path / "guard"))
    assert by_parts(found) == by_parts(made)
    assert (
        found.save_pretrained(tmp_path / "again").joinpath(JSON_FILE).read_bytes()
        == (tmp_path / "guard" / JSON_FILE).read_bytes()
    )


@pytest.mark.parametrize("rule", RULES)
def test_loaded_gives_the_same_verdicts_and_logits(model, tokenizer, tmp_path, rule):
    made = make_guardrail(model, tokenizer, make_sae("jumprelu"), 1, **RULES[rule] | {"threshold": 0.3})
    found = Guardrail.from_pretrained(made.save_pretrained(tmp_path / "guard"))
    inputs = tokenizer(["The planets move around the sun.", "Knead the dough."], return_tensors="pt", padding=True)
    results = []
    for one in (made, found):
        with torch.inference_mode(), one.attach(model, tokenizer) as guard:
            results.append(
                (model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits, guard.verdicts)
            )
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("file", [JSON_FILE, TENSOR_FILE])
def test_a_flipped_byte_anywhere_is_a_named_error(saved, file):
    path = saved / file
    whole = path.read_bytes()
    positions = random.Random(0).sample(range(len(whole)), 120)
    for place in [*range(12), *positions]:
        for flip in (0x01, 0x20, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            with pytest.raises(ArtifactError):
                Guardrail.from_pretrained(saved)
    path.write_bytes(whole)
    assert Guardrail.from_pretrained(saved).layer == 2


def test_a_number_altered_to_infinity_is_damage(llama, tokenizer, tmp_path):
    saved = make_guardrail(llama, tokenizer, make_sae("relu"), 2, threshold=1e-05).save_pretrained(tmp_path / "guard")
    text = (saved / JSON_FILE).read_text("utf-8")
    assert "1e-05" in text
    for found in ("1e905", "-1e99", "NaN"):
        (saved / JSON_FILE).write_text(text.replace("1e-05", found), "utf-8")
        with pytest.raises(ArtifactDamagedError):
            Guardrail.from_pretrained(saved)


@pytest.mark.parametrize("file", [JSON_FILE, TENSOR_FILE])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_and_missing_files(saved, file, keep):
    whole = (saved / file).read_bytes()
    (saved / file).write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ArtifactDamagedError):
        Guardrail.from_pretrained(saved)
    (saved / file).unlink()
    with pytest.raises(ArtifactDamagedError):
        Guardrail.from_pretrained(saved)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"format_version"', "{}", "[" * 100_000])
def test_json_of_another_kind(saved, text):
    (saved / JSON_FILE).write_text(text)
    with pytest.raises(ArtifactDamagedError):
        Guardrail.from_pretrained(saved)


def test_another_format_version_is_refused_by_name(saved):
    change_json(saved, lambda content: content.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(ArtifactVersionError, match=f"found {FORMAT_VERSION + 1}, expected {FORMAT_VERSION}") as caught:
        Guardrail.from_pretrained(saved)
    assert (caught.value.found, caught.value.expected) == (FORMAT_VERSION + 1, FORMAT_VERSION)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no rules": lambda c: c.pop("rules"),
    "rules of another kind": lambda c: c.update(rules=[3]),
    "unknown gate": lambda c: c["rules"][0]["gate"].update(kind="magic"),
    "unknown accumulator": lambda c: c["rules"][0]["gate"]["accumulator"].update(kind="magic"),
    "a clamp field too many": lambda c: c["rules"][0]["clamp"].update(more=1),
    "a feature field too few": lambda c: c["rules"][0]["features"][0].pop("ratio"),
    "a second rule without tensors": lambda c: c["rules"].append(c["rules"][0]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_whole_but_senseless_content_is_damage(saved, case):
    change_json(saved, BROKEN[case])
    with pytest.raises(ArtifactDamagedError):
        Guardrail.from_pretrained(saved)


def test_no_folder_and_no_hub_id(tmp_path):
    for source in (tmp_path / "missing", "just-a-name", "./relative/path"):
        with pytest.raises(ArtifactError, match="neither a folder nor a hub id"):
            Guardrail.from_pretrained(source)


def test_a_foreign_folder_is_not_overwritten(guardrail, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not a guardrail"):
        guardrail.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="not a guardrail"):
        guardrail.save_pretrained(tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_older_guardrail_and_an_empty_folder_are_replaced(guardrail, saved, tmp_path):
    newer = replace(guardrail, layer=1)
    (saved / "pages").mkdir()
    (saved / "pages" / "mine.html").write_text("mine")
    newer.save_pretrained(saved)
    assert Guardrail.from_pretrained(saved).layer == 1
    (tmp_path / "empty").mkdir()
    newer.save_pretrained(tmp_path / "empty")
    newer.save_pretrained(tmp_path / "new" / "nested")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "guard", "new"]
    assert sorted(path.name for path in saved.iterdir()) == [CARD_FILE, JSON_FILE, TENSOR_FILE, "pages"]
    assert (saved / "pages" / "mine.html").read_text() == "mine"


def test_a_failed_write_leaves_the_older_guardrail(guardrail, saved):
    hopeless = replace(guardrail, rules=(replace(guardrail.rule, evidence={"auroc": float("nan")}),))
    with pytest.raises(ArtifactError):
        hopeless.save_pretrained(saved)
    assert by_parts(Guardrail.from_pretrained(saved)) == by_parts(guardrail)
    assert [path.name for path in saved.parent.iterdir()] == ["guard"]


def test_where_nothing_can_be_written(guardrail, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        guardrail.save_pretrained(tmp_path / "file" / "guard")


def test_it_fits_only_its_own_model_tokenizer_and_layer(guardrail, llama, tokenizer):
    guardrail.check(llama, tokenizer)
    for other in (make_model("llama", seed=1), make_model("gemma"), make_model("gpt2")):
        with pytest.raises(ArtifactMismatchError) as caught:
            guardrail.check(other, tokenizer)
        assert caught.value.found != caught.value.expected
    with pytest.raises(ArtifactMismatchError, match="tokenizer"):
        guardrail.check(llama, make_tokenizer(chat=False))
    with pytest.raises(LayerError, match="found 4, expected 0 to 3"):
        replace(guardrail, layer=4).check(llama, tokenizer)
    narrow = replace(guardrail.rule, decoder=guardrail.rule.decoder[:, :-1])
    with pytest.raises(ArtifactMismatchError, match="width at resid_post"):
        replace(guardrail, rules=(narrow,)).check(llama, tokenizer)


def test_a_weight_changed_up_to_the_guarded_layer_is_another_model(guardrail, tokenizer):
    model = make_model("llama")
    guardrail.check(model, tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ArtifactMismatchError, match="weights"):
        guardrail.check(model, tokenizer)


def test_attach_refuses_before_any_hook_is_placed(guardrail, tokenizer):
    model = make_model("gpt2")
    with pytest.raises(ArtifactMismatchError), guardrail.attach(model, tokenizer):
        raise AssertionError("the block must not run")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_merged_rules_are_all_there_and_survive_saving(guardrail, tmp_path):
    other = replace(guardrail, rules=(replace(guardrail.rule, name="other", threshold=0.9, gate=Gate(EVIDENCE)),))
    both = merge([guardrail, other])
    assert by_parts(both.rules) == by_parts((guardrail.rule, other.rule))
    assert by_parts(Guardrail.from_pretrained(both.save_pretrained(tmp_path / "both"))) == by_parts(both)
    with pytest.raises(GuardrailError, match="2 rules"):
        _ = both.threshold
    assert by_parts(merge([guardrail])) == by_parts(guardrail)


def test_what_cannot_be_merged(guardrail):
    renamed = replace(guardrail, rules=(replace(guardrail.rule, name="other"),))
    refused = {
        "layer": replace(renamed, layer=1),
        "tokenizer": replace(renamed, tokenizer="another"),
        "weights": replace(renamed, model={**guardrail.model, "weights": "another"}),
        "one name": guardrail,
    }
    for said, other in refused.items():
        with pytest.raises(MergeError, match=said):
            merge([guardrail, other])
    with pytest.raises(MergeError, match="nothing"):
        merge([])


def test_its_faces(guardrail):
    rule = guardrail.rule
    assert guardrail.features == (3, 7, 11, 19, 23, 42)
    assert (guardrail.threshold, guardrail.gate, guardrail.clamp) == (rule.threshold, rule.gate, rule.clamp)
    assert (guardrail.action, guardrail.evidence) == ("clamp", rule.evidence)


def test_the_card_names_every_rule(guardrail, tmp_path):
    other = replace(guardrail, rules=(replace(guardrail.rule, name="volcanoes"),))
    card = (merge([guardrail, other]).save_pretrained(tmp_path / "both") / CARD_FILE).read_text("utf-8")
    assert "## topic" in card
    assert "## volcanoes" in card
    assert "layer 2" in card
