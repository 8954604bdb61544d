"""`fit` from end to end on a tiny random model and invented topics, and all that can be wrong with what it is given."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_guardrail, make_model, make_sae
from reference import FullSAE, authors_clamp, authors_density, authors_mean, authors_selection
from saeguard import Guardrail, errors, fit, shards
from saeguard.cli.main import main
from saeguard.config import PRESETS
from saeguard.corpus import Corpus
from saeguard.hookpoints import HookPoint
from saeguard.hooks import at
from saeguard.model import port_at, residual_stream
from saeguard.report.overlap import overlaps
from saeguard.selection import SelectionRule
from saeguard.windows import Windower
from topics import LAYER, SMALL, corpora, passages, save_all

PAPER = replace(PRESETS["paper"], n=5, p_ratio=50.0, lengths=(24,), force=True)
FILES = ("guardrail.json", "guardrail.safetensors")
MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def sae():
    return make_sae("jumprelu")


@pytest.fixture(scope="module")
def fitted(llama, tokenizer, sae) -> Guardrail:
    forget, retain = corpora()
    return fit(llama, tokenizer, sae, layer=LAYER, forget=forget, retain=retain, config=SMALL)


@pytest.fixture
def run(llama, tokenizer, sae):
    """`fit` of the small topics, with changes."""

    def run(config=SMALL, **changes) -> Guardrail:
        forget, retain = corpora()
        given = {"model": llama, "tokenizer": tokenizer, "sae": sae, "layer": LAYER, "forget": forget, "retain": retain}
        given |= changes
        return fit(given.pop("model"), given.pop("tokenizer"), given.pop("sae"), config=config, **given)

    return run


def written(guardrail: Guardrail, folder: Path) -> dict[str, bytes]:
    guardrail.save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in FILES}


class TestGuardrail:
    def test_it_holds_every_figure(self, fitted):
        evidence = fitted.evidence
        assert set(evidence["gates"]) == {"density", "evidence", "probe"}
        assert evidence["chosen"] in evidence["gates"]
        assert evidence["why_this_gate"]
        for figures in evidence["gates"].values():
            assert {"threshold", "method", "bounds", "caught", "false_positives", "by_length", "auroc", "curve"} <= set(
                figures
            )
            assert set(figures["false_positives"]) == {"kitchen", "garden"}
            low, high = figures["caught"]["interval"]
            assert 0 <= low <= figures["caught"]["rate"] <= high <= 1
            assert figures["threshold"] == max(bound["value"] for bound in figures["bounds"])
            highest = max(figures["bounds"], key=lambda bound: bound["value"])
            least = min(bound["caught"] for bound in figures["bounds"])
            assert highest["caught"] == figures["caught"]["hits"] == least
            assert all(sum(counts) for counts in figures["histograms"]["counts"].values())
        assert set(evidence["corpora"]) == {"forget", "kitchen", "garden"}
        assert all(evidence["windows"][split] > 0 for split in ("fit", "calibration", "test"))
        assert set(evidence["passages"]) == {str(feature) for feature in fitted.features}
        assert set(evidence["proof"]) == {"fires", "silent"}
        assert evidence["median_residual_norm"] == pytest.approx(fitted.clamp.c / SMALL.strength)
        for feature in fitted.rule.selected:
            assert set(feature.firing_rates) == {"forget", "kitchen", "garden"}

    def test_its_proof_holds_in_a_pass_of_its_own(self, fitted, llama, tokenizer):
        with fitted.attach(llama, tokenizer) as guard:
            fires, silent = (
                guard.judge(torch.tensor([tokenizer(fitted.evidence["proof"][name])["input_ids"]]))[0].triggered
                for name in ("fires", "silent")
            )
        assert (fires, silent) == (True, False)

    def test_it_tells_the_topics_apart(self, fitted, llama, tokenizer):
        unseen = passages("forget", 40, seed=1), passages("kitchen", 40, seed=1)
        with fitted.attach(llama, tokenizer) as guard:
            caught, false = (
                sum(guard.judge(torch.tensor([tokenizer(text)["input_ids"]]))[0].triggered for text in texts)
                for texts in unseen
            )
        assert caught >= 36
        assert false <= 16

    def test_figures_are_of_documents_that_neither_fitted_nor_calibrated(self, fitted, tokenizer):
        forget, _ = corpora()
        splits = [document.split for document in Corpus.of("forget", "forget", forget).documents()]
        windower = Windower(tokenizer, SMALL.lengths)
        tested = [
            window
            for document in Corpus.of("forget", "forget", forget).documents()
            if document.split == "test"
            for window in windower.cut(document)
        ]
        assert splits.count("test") == 8
        assert fitted.evidence["gates"]["evidence"]["caught"]["n"] == len(tested)

    def test_fitting_again_gives_the_same_bytes(self, fitted, run, tmp_path):
        assert written(run(), tmp_path / "again") == written(fitted, tmp_path / "first")

    def test_the_order_of_the_retain_corpora_changes_no_decision(self, fitted, run):
        _, retain = corpora()
        other = run(retain=dict(reversed(retain.items())))
        assert other.features == fitted.features
        assert other.threshold == pytest.approx(fitted.threshold, rel=1e-6)

    @pytest.mark.parametrize("gate", ["density", "evidence", "probe"])
    def test_the_gate_asked_for_is_the_gate_given(self, run, gate):
        guardrail = run(replace(SMALL, gate=gate))
        assert (guardrail.gate.kind, guardrail.evidence["why_this_gate"]) == (gate, "asked for")

    def test_a_topk_sae_says_how_it_is_carried_and_what_the_other_way_would_be_like(self, run, fitted):
        exact, fixed = (run(replace(SMALL, topk=topk), sae=make_sae("topk")) for topk in ("exact", "threshold"))
        assert (exact.evidence["topk"]["mode"], exact.rule.encoder.k) == ("exact", 10)
        assert (fixed.evidence["topk"]["mode"], fixed.rule.encoder.k) == ("threshold", None)
        assert exact.evidence["topk"] == fixed.evidence["topk"] | {"mode": "exact"}
        assert 0.2 < exact.evidence["topk"]["agreement"] < 1
        assert exact.evidence["topk"]["active"] <= exact.evidence["topk"]["tokens"] * len(exact.features)
        assert fitted.evidence["topk"] is None


class TestHookPoint:
    PLACES = (("resid_post", "resid_post"), ("mlp_out", "mlp_out"), ("attn_z", "attn_z"), ("mlp_in", "mlp_out"))

    @pytest.mark.parametrize(("hook", "hook_out"), PLACES)
    def test_what_is_served_is_what_was_calibrated(self, run, fitted, llama, tokenizer, hook, hook_out):
        sae = make_sae("jumprelu")
        sae = replace(sae, W_enc=4 * sae.W_enc, metadata={"hook": hook, "hook_out": hook_out, "layer": LAYER})
        found = run(sae=sae)
        assert (found.layer, found.hook, found.hook_out) == (LAYER, hook, hook_out)
        assert found.evidence["median_residual_norm"] == fitted.evidence["median_residual_norm"]
        forget, _ = corpora()
        tested = [d for d in Corpus.of("forget", "forget", forget).documents() if d.split == "test"]
        windows = [window for d in tested for window in Windower(tokenizer, SMALL.lengths).cut(d)]
        with found.attach(llama, tokenizer) as guard:
            caught = sum(guard.judge(torch.tensor([window.ids]))[0].triggered for window in windows)
        assert caught == found.evidence["gates"][found.evidence["chosen"]]["caught"]["hits"]

    def test_a_place_the_model_lacks_and_another_width_are_refused(self, run, sae):
        with pytest.raises(errors.SAEMismatchError, match="width of the SAE at mlp_out: found 16, expected 32"):
            run(sae=replace(make_sae("relu", d_model=16), metadata={"hook": "mlp_out"}))


class TestRetainScore:
    def test_worst_case_is_the_highest_of_the_corpora_and_pooled_lies_between(self, run):
        wide = replace(SMALL, n=20, p_ratio=0.0)
        found = {name: run(replace(wide, retain_score=name)) for name in ("worst", "pooled")}
        worst, pooled = ({f.id: f.retain_score for f in found[name].rule.selected} for name in ("worst", "pooled"))
        shared = worst.keys() & pooled.keys()
        assert len(shared) > 5
        assert all(worst[j] >= pooled[j] for j in shared)
        assert any(worst[j] > 1.2 * pooled[j] for j in shared)

    def test_a_small_neighbour_counts_in_full_only_in_the_worst_case(self, run):
        """A neighbour that shares the topic's words is drowned by a large far corpus when pooled."""
        near = [f"{a} {b}" for a, b in zip(passages("forget", 20, seed=2), passages("garden", 20, seed=2), strict=True)]
        retain = {"far": passages("kitchen", 200), "near": near}
        rates = {}
        for name in ("worst", "pooled"):
            found = run(replace(SMALL, retain_score=name, p_ratio=80.0), retain=retain)
            rates[name] = np.mean([f.ratio for f in found.rule.selected])
        assert rates["worst"] < rates["pooled"]


@pytest.fixture(scope="module")
def by_authors(llama, tokenizer, sae) -> Guardrail:
    forget, retain = corpora()
    return fit(llama, tokenizer, sae, layer=LAYER, forget=forget, retain=retain, config=PAPER)


@pytest.fixture(scope="module")
def full(sae) -> FullSAE:
    return FullSAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, "jumprelu", threshold=sae.activation.threshold)


@pytest.fixture(scope="module")
def read(llama, tokenizer, full):
    """For a split: ids, residual streams and activations of every window of some texts, one by one."""

    def read(texts, split):
        rows = []
        windower = Windower(tokenizer, PAPER.lengths)
        for document in Corpus.of("texts", "retain", texts).documents():
            if document.split == split:
                for window in windower.cut(document):
                    ids = torch.tensor([window.ids])
                    hidden = residual_stream(llama, LAYER, ids, torch.ones_like(ids))[0]
                    rows.append((ids[0], hidden, full.encode(hidden).numpy()))
        return rows

    return read


@pytest.fixture(scope="module")
def fit_rows(read):
    forget, retain = corpora()
    return read(forget, "fit"), [row for texts in retain.values() for row in read(texts, "fit")]


class TestPaperPreset:
    """The preset against the numbers of the authors' code, on the same activations."""

    @staticmethod
    def flat(rows, tokenizer):
        ids = torch.cat([row[0] for row in rows]).numpy()
        activations = np.concatenate([row[2] for row in rows])
        return activations[None], np.isin(ids, tokenizer.all_special_ids)[None]

    def test_scores_and_order(self, by_authors, fit_rows, tokenizer):
        forget, retain = (authors_mean(*self.flat(rows, tokenizer)) for rows in fit_rows)
        expected = authors_selection(forget, retain, p_ratio=PAPER.p_ratio, n=PAPER.n)
        assert list(by_authors.features) == expected
        for feature in by_authors.rule.selected:
            assert feature.forget_score == pytest.approx(forget[feature.id] ** 2, abs=3e-6)
            assert feature.retain_score == pytest.approx(retain[feature.id] ** 2, abs=3e-6)

    def test_the_score_of_the_paper_itself(self, run, fit_rows, tokenizer):
        found = run(replace(PAPER, score="second_moment"))
        for rows, name in zip(fit_rows, ("forget_score", "retain_score"), strict=True):
            activations, special = self.flat(rows, tokenizer)
            moment = np.square(activations[~special].astype(np.float64)).mean(axis=0)
            for feature in found.rule.selected:
                assert getattr(feature, name) == pytest.approx(moment[feature.id], rel=1e-4)
        scores = [feature.forget_score for feature in found.rule.selected]
        assert scores == sorted(scores, reverse=True)

    def test_threshold(self, by_authors, read):
        _, retain = corpora()
        rows = [row for texts in retain.values() for row in read(texts, "calibration")]
        rho = [float(authors_density(row[2][None], by_authors.features)[0]) for row in rows]
        assert by_authors.threshold == pytest.approx(float(np.percentile(rho, 95)), abs=1e-9)

    def test_logits(self, by_authors, read, full, llama, tokenizer):
        forget, _ = corpora()
        triggered = 0
        for ids, hidden, _ in read(forget, "test"):
            clamped = authors_clamp(full, hidden[None], by_authors.features, 500.0, by_authors.threshold)
            with torch.inference_mode():
                with at(port_at(llama, HookPoint(LAYER)), lambda _values, new=clamped: new):
                    expected = llama(ids[None]).logits
                with by_authors.attach(llama, tokenizer) as guard:
                    found = llama(ids[None]).logits
                    triggered += guard.verdicts[0].triggered
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
        assert triggered > 0
        assert by_authors.clamp.c == 500.0


class TestQuarantine:
    PLANTED = passages("forget", 1, words=24, seed=11)[0]

    @pytest.fixture
    def planted(self):
        _, retain = corpora()
        retain["garden"] = [self.PLANTED, *retain["garden"]]
        return retain

    def test_a_planted_passage_is_found_listed_and_left_out(self, run, planted):
        found = run(retain=planted)
        contamination = found.evidence["contamination"]
        assert contamination["quarantined"] == 1
        assert [suspect["outlier"] for suspect in contamination["listed"]].count(True) == 1
        worst = contamination["listed"][0]
        assert (worst["corpus"], worst["document"], worst["outlier"]) == ("garden", 0, True)
        assert worst["score"] >= contamination["retain_bound"]
        assert worst["text"] == self.PLANTED[: len(worst["text"])]
        other = found.evidence["threshold_other_way"]
        assert other["quarantine"] is False
        assert set(other["false_positives"]) == {"kitchen", "garden"}

    def test_without_quarantine_it_is_listed_and_stays_in(self, run, planted):
        kept, quarantined = run(replace(SMALL, quarantine=False), retain=planted), run(retain=planted)
        assert kept.evidence["contamination"] == quarantined.evidence["contamination"]
        assert kept.evidence["threshold_other_way"]["quarantine"] is True
        assert kept.evidence["windows"]["fit"] > quarantined.evidence["windows"]["fit"]
        assert kept.evidence["windows"]["test"] == quarantined.evidence["windows"]["test"]


class TestOverlaps:
    """What `fit` says of texts that lie on the wrong side, by the corpus's name."""

    def test_of_clean_corpora_it_says_nothing(self, fitted):
        assert overlaps(fitted.rule) == []

    def test_retain_text_about_the_topic(self, run):
        _, retain = corpora()
        retain["garden"] = [*passages("forget", 8, seed=3), *retain["garden"]]
        found = run(retain=retain)
        share = found.evidence["contamination"]["shares"]
        assert "kitchen" not in share
        assert share["garden"]["hits"] == found.evidence["contamination"]["quarantined"] >= 3
        said = overlaps(found.rule)[-1]
        assert f"({share['garden']['hits']} of {share['garden']['n']}) of garden read like the topic" in said
        assert "left out of calibration" in said
        assert said.endswith("fit with --near-retain garden.")
        kept = overlaps(run(replace(SMALL, quarantine=False), retain=retain).rule)[-1]
        assert "of garden read like the topic and were kept" in kept

    def test_of_a_corpus_named_as_near_nothing_is_left_out(self, run):
        _, retain = corpora()
        retain["garden"] = [*passages("forget", 8, seed=3), *retain["garden"]]
        left_out, spared = run(retain=retain), run(replace(SMALL, near_retain=("garden",)), retain=retain)
        assert spared.evidence["contamination"] == left_out.evidence["contamination"]
        assert "threshold_other_way" not in spared.evidence
        taken = left_out.evidence["contamination"]["quarantined"]
        for split in ("fit", "calibration"):
            assert spared.evidence["windows"][split] >= left_out.evidence["windows"][split]
        assert sum(spared.evidence["windows"].values()) == sum(left_out.evidence["windows"].values()) + taken
        assert "of garden read like the topic and were kept" in overlaps(spared.rule)[-1]
        assert spared.evidence["config"]["near_retain"] == ["garden"]

    def test_forget_text_about_something_else(self, run):
        forget, _ = corpora()
        found = run(forget=[*passages("kitchen", 12, seed=3), *forget])
        share = found.evidence["contamination"]["forget_among_retain"]
        assert 6 <= share["hits"] <= 12
        assert f"({share['hits']} of {share['n']}) of the topic read like retain text" in overlaps(found.rule)[0]

    def test_a_twin_of_the_topic(self, run):
        _, retain = corpora()
        topic, twin = overlaps(run(retain=retain | {"twin": passages("forget", 40, seed=3)}).rule)
        assert "of the topic read like retain text" in topic
        assert "of twin read like the topic" in twin


class TestBadInput:
    @pytest.mark.parametrize("texts", [[], ["", "  ", "\n"]])
    def test_an_empty_corpus(self, run, texts):
        with pytest.raises(errors.CorpusError, match=r"'forget'.*holds no text"):
            run(forget=texts)
        with pytest.raises(errors.CorpusError, match=r"'garden'.*holds no text"):
            run(retain={"garden": texts})

    def test_an_empty_file(self, run, tmp_path):
        (tmp_path / "empty.txt").write_text("")
        with pytest.raises(errors.CorpusError, match=r"empty\.txt.*holds no text"):
            run(forget=tmp_path / "empty.txt")

    def test_a_near_corpus_that_is_not_there(self, run):
        with pytest.raises(errors.CorpusError, match=r"\['pond'\]. Expected some of \['kitchen', 'garden'\]"):
            run(replace(SMALL, near_retain=("garden", "pond")))

    def test_no_retain_corpus(self, run):
        with pytest.raises(errors.CorpusError, match="no retain corpus"):
            run(retain={})

    def test_a_retain_corpus_named_forget(self, run):
        with pytest.raises(errors.CorpusError, match="cannot be named 'forget'"):
            run(retain={"forget": passages("kitchen", 40)})

    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_a_tiny_forget_corpus(self, run, count):
        with pytest.raises(errors.TooFewSequencesError):
            run(forget=passages("forget", count))

    def test_a_tiny_forget_corpus_of_long_documents(self, run):
        with pytest.raises(errors.TooFewSequencesError):
            run(forget=passages("forget", 3, words=400))

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_a_tiny_retain_corpus(self, run, count):
        with pytest.raises(errors.TooFewSequencesError, match="garden"):
            run(retain={"kitchen": passages("kitchen", 40), "garden": passages("garden", count)})

    def test_a_text_in_both_corpora(self, run):
        forget, retain = corpora()
        retain["garden"][7] = f"  {forget[3].upper()} "
        with pytest.raises(errors.CorpusOverlapError, match="1 of 40 documents of the retain corpus 'garden'"):
            run(retain=retain)

    @pytest.mark.parametrize("layer", [-1, 4, 99])
    def test_a_layer_out_of_range(self, run, layer):
        with pytest.raises(errors.LayerError, match="expected 0 to 3") as caught:
            run(layer=layer)
        assert caught.value.found == layer

    def test_an_sae_of_another_width(self, run):
        with pytest.raises(errors.SAEMismatchError, match="found 48, expected 32"):
            run(sae=make_sae("relu", d_model=48))

    def test_an_sae_of_another_layer(self, run, sae):
        with pytest.raises(errors.SAEMismatchError, match="found 2, expected 1"):
            run(replace(SMALL, force=False), sae=replace(sae, metadata={"layer": 1}))

    @pytest.mark.parametrize("bad", [None, 3, ["a"], {"text": "a"}])
    def test_rows_that_are_no_text(self, run, bad, tmp_path):
        forget, _ = corpora()
        with pytest.raises(errors.CorpusError, match="row 3: found"):
            run(forget=[*forget[:2], bad, *forget[2:]])
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(json.dumps({"text": text}) for text in [*forget[:2], bad]))
        with pytest.raises(errors.CorpusError, match=r"rows\.jsonl, row 3: found"):
            run(forget=file)

    def test_a_broken_gzip(self, run, tmp_path):
        forget, _ = corpora()
        whole = gzip.compress("\n".join(json.dumps({"text": text}) for text in forget).encode())
        file = tmp_path / "cut.jsonl.gz"
        for damaged in (whole[: len(whole) // 2], b"not gzip at all", whole[:20] + b"\xff" * 30 + whole[50:]):
            file.write_bytes(damaged)
            with pytest.raises(errors.CorpusError, match=r"cut\.jsonl\.gz"):
                run(forget=file)

    def test_activations_that_are_no_numbers(self, run, llama):
        broken = copy.deepcopy(llama)
        with torch.no_grad():
            broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        with pytest.raises(errors.NonFiniteError, match=f"layer {LAYER}"):
            run(model=broken)

    def test_more_features_than_survive(self, run):
        with pytest.raises(errors.SelectionError, match="expected at least n = 60") as caught:
            run(replace(SMALL, n=60))
        assert caught.value.found < 60

    def test_too_few_sequences_for_alpha(self, run):
        with pytest.raises(errors.TooFewSequencesError, match="expected at least 99"):
            run(replace(SMALL, alpha=0.01))

    def test_a_damaged_guardrail(self, fitted, tmp_path):
        folder = fitted.save_pretrained(tmp_path / "guard")
        for name in FILES:
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[:-40])
            with pytest.raises(errors.ArtifactDamagedError):
                Guardrail.from_pretrained(folder)
            (folder / name).write_bytes(whole)
        assert Guardrail.from_pretrained(folder).features == fitted.features

    def test_a_foreign_guardrail(self, fitted, tokenizer, sae, tmp_path):
        with pytest.raises(errors.ArtifactMismatchError), fitted.attach(make_model("llama", seed=1), tokenizer):
            pass
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(errors.ArtifactError):
            Guardrail.from_pretrained(tmp_path)
        with pytest.raises(errors.ArtifactError, match="not a guardrail"):
            fitted.save_pretrained(tmp_path)
        other = make_guardrail(make_model("gpt2"), tokenizer, sae, LAYER)
        with pytest.raises(errors.ArtifactMismatchError), other.attach(make_model("llama"), tokenizer):
            pass


class TestDisk:
    def test_a_work_folder_that_cannot_be(self, run, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(errors.CorpusError, match="work folder"):
            run(work_dir=tmp_path / "file")

    def test_a_full_disk_while_fitting_loses_no_shard(self, run, fitted, tmp_path, monkeypatch):
        monkeypatch.setattr(shards, "SHARD_CHARACTERS", 800)
        disk, roomy = tmp_path / "disk", tmp_path / "roomy"
        disk.mkdir()
        if (
            os.geteuid() != 0
            or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, check=False
            ).returncode
        ):
            pytest.skip("needs the right to mount a small disk")
        try:
            with pytest.raises(errors.CorpusError, match=r"No space.*kept"):
                run(work_dir=disk)
            finished = shard_files(disk)
            assert finished
            assert not list(disk.rglob("*.partial"))
            subprocess.run(["cp", "-a", f"{disk}/.", str(roomy)], check=True)
            before = identities(roomy)
            resumed = run(work_dir=roomy)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        assert before.items() <= identities(roomy).items()
        assert written(resumed, tmp_path / "a") == written(run(work_dir=tmp_path / "new"), tmp_path / "b")

    def test_a_file_that_cannot_be_written_whole(self, run, tmp_path):
        """The same without a mount: this process may not write files above a size."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(errors.CorpusError, match="cannot write"):
                run(work_dir=tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.rglob("*.*")) == []

    def test_a_damaged_shard_is_computed_again(self, run, fitted, tmp_path):
        run(work_dir=tmp_path)
        victim = shard_files(tmp_path)[0]
        victim.write_bytes(victim.read_bytes()[:-100])
        assert dataclasses.asdict(run(work_dir=tmp_path).rule)["threshold"] == fitted.threshold


SLOW_FIT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM
from saeguard import shards
from saeguard.cli.main import main

shards.SHARD_CHARACTERS = 800
register_module_forward_pre_hook(lambda module, args: time.sleep(0.3) if isinstance(module, LlamaForCausalLM) else None)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, llama, tokenizer, sae) -> list[str]:
    """Model, SAE and texts as files, and the command that fits them."""
    return save_all(tmp_path_factory.mktemp("saved"), llama, tokenizer, sae)


class TestKilled:
    @pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
    def test_a_killed_fit_goes_on_where_it_was(self, sent, status, saved, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(shards, "SHARD_CHARACTERS", 800)
        out, work = tmp_path / "guard", tmp_path / "work"
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", SLOW_FIT, *saved, "--out", out, "--work", work],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while len(shard_files(work)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(sent)
        _, said = process.communicate(timeout=30)
        assert process.returncode == status, said
        assert "Traceback" not in said
        assert not out.exists()
        before = identities(work)
        assert len(before) >= 3
        assert main([*saved, "--out", str(out), "--work", str(work)]) == 0
        after = identities(work)
        assert before.items() <= after.items()
        assert len(after) > len(before)
        assert main([*saved, "--out", str(tmp_path / "whole"), "--work", str(tmp_path / "other")]) == 0
        assert [(out / name).read_bytes() for name in FILES] == [
            (tmp_path / "whole" / name).read_bytes() for name in FILES
        ]
        capsys.readouterr()


class TestMemory:
    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak of this process alone")
    def test_the_peak_does_not_grow_with_the_text(self, run, tmp_path):
        peaks = {}
        for scale in (1, 1, 10):
            files = {name: tmp_path / f"{name}{scale}.txt" for name in ("forget", "kitchen")}
            for name, file in files.items():
                file.write_text("\n".join(passages(name, 40 * scale, words=250)))
            Path("/proc/self/clear_refs").write_text("5")
            run(replace(SMALL, sample=1_500), forget=files["forget"], retain={"kitchen": files["kitchen"]})
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peaks[scale] = int(status["VmHWM"].split()[0]) * 1024
        assert peaks[10] - peaks[1] < 12 * MEGABYTE


def shard_files(work: Path) -> list[Path]:
    return sorted(work.rglob("*.safetensors"))


def identities(work: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of writing of every finished shard."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shard_files(work)}


@pytest.mark.parametrize("gate", ["evidence", "probe"])
def test_a_threshold_of_ones_own_leaves_the_drift_that_calibration_chooses(run, gate):
    calibrated = run(replace(SMALL, gate=gate)).rule
    for threshold in (calibrated.threshold / 10, 10 * calibrated.threshold):
        given = run(replace(SMALL, gate=gate, threshold=threshold)).rule
        assert given.threshold == threshold
        assert given.gate.accumulator == calibrated.gate.accumulator


def test_the_score_of_the_preset_is_the_code_s_and_of_the_default_the_paper_s():
    assert (PRESETS["paper"].selection, PRESETS["default"].selection.score) == (
        SelectionRule(20, 95.0, "squared_mean", "pooled", 1e-4, True), "second_moment"
    )  # fmt: skip
