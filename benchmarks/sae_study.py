"""Which SAE makes the best guardrail: each of some trained SAEs through the procedure of quickstart.

    python benchmarks/sae_study.py SAE_FOLDER... [--texts NAME=FILE...]

Prints one row an SAE: its quality on held-out windows (of `--texts`, else of the starter set), what each gate
catches on held-out text, and the accuracy on the topic's and the near questions with the gate of quickstart.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from saeguard.cli.options import named_files
from saeguard.config import PRESETS
from saeguard.corpus import Corpus
from saeguard.embedded import NEAR, TOPIC, embedded_model, starter_set
from saeguard.evaluation.mcq import accuracy, answer_questions, trigger_rate
from saeguard.fitting import fit
from saeguard.quickstart import ALPHA, GATE, STRENGTH
from saeguard.sae import SparseAutoencoder
from saeguard.sae.quality import measure
from saeguard.sae.residuals import training_windows


def main() -> None:
    """One JSON line an SAE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("saes", nargs="+")
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--work", default="study.work")
    args = parser.parse_args()
    model, tokenizer = embedded_model()
    starter = starter_set()
    texts = named_files(args.texts) or {name: str(path) for name, path in starter.retain.items()}
    corpora = [Corpus.of(name, "retain", file) for name, file in texts.items()]
    held_out = training_windows(tokenizer, corpora, 8_000, split="test")
    config = replace(PRESETS["default"], name=TOPIC, alpha=ALPHA, gate=GATE, strength=STRENGTH)
    for folder in args.saes:
        sae = SparseAutoencoder.load(folder)
        layer = sae.layer or 0
        guardrail = fit(
            model, tokenizer, sae, layer=layer, forget=starter.forget, retain=starter.retain, config=config,
            work_dir=args.work, show_progress=True,
        )  # fmt: skip
        gates = guardrail.evidence["gates"]
        row = {
            "sae": folder,
            "layer": layer,
            "width": sae.d_sae,
            **measure(model, tokenizer, sae, layer, held_out).as_dict(),
        }
        row["gates"] = {
            name: [gate["caught"]["rate"], max(rate["rate"] for rate in gate["false_positives"].values())]
            for name, gate in gates.items()
        }
        for name in (TOPIC, *NEAR):
            answers = answer_questions(model, tokenizer, starter.questions[name], guardrail)
            row[name] = [accuracy(answers).value, trigger_rate(answers).value]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
