"""Features chosen by their explanations, without forget text, judged on topic text and questions that chose nothing.

    python benchmarks/zero_shot.py "planets, stars and space" [--n 10 20 40] [--semantic MODEL]

The starter set's topic passages of the split `test` and its questions judge; the topic neither fits nor calibrates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from saeguard import Guardrail, fit
from saeguard.calibration import Rate
from saeguard.config import FitConfig
from saeguard.corpus import Corpus
from saeguard.embedded import EXPLANATIONS, LAYER, TOPIC, embedded_model, embedded_sae, starter_set
from saeguard.explain.explanations import read_explanations
from saeguard.explain.matching import by_meaning, by_words, given
from saeguard.quickstart import judge
from saeguard.windows import Windower


def caught(model, tokenizer, guardrail: Guardrail, windower: Windower) -> Rate:
    """How many windows of the topic's held-out passages trigger."""
    documents = Corpus.of("forget", "forget", starter_set().forget).documents()
    windows = [window for document in documents if document.split == "test" for window in windower.cut(document)]
    with guardrail.attach(model, tokenizer) as guard:
        hits = sum(guard.judge(torch.tensor([window.ids], device=model.device))[0].triggered for window in windows)
    return Rate(hits, len(windows))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("about")
    parser.add_argument("--n", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--gates", nargs="+", default=["evidence", "density"])
    parser.add_argument("--semantic")
    parser.add_argument("--explanations", default=str(EXPLANATIONS))
    parser.add_argument("--work", default="zero-shot.work")
    parser.add_argument("--questions", action="store_true")
    args = parser.parse_args()
    (model, tokenizer), starter, sae = embedded_model(), starter_set(), embedded_sae()
    explanations = read_explanations(args.explanations)
    rows = explanations.rows
    found = by_meaning(rows, args.about, args.semantic) if args.semantic else by_words(rows, args.about)
    print(f"{len(found)} features match")
    for n in args.n:
        for gate in args.gates:
            config = FitConfig(name=TOPIC, gate=gate, given=given(found[:n], explanations, args.about, "benchmark"))
            guardrail = fit(
                model, tokenizer, sae, layer=LAYER, retain=starter.retain, config=config, work_dir=Path(args.work)
            )
            false = [Rate(r["hits"], r["n"]) for r in guardrail.evidence["gates"][gate]["false_positives"].values()]
            rate = caught(model, tokenizer, guardrail, Windower(tokenizer, config.lengths, chat=True))
            low, high = rate.interval
            print(
                f"n {len(guardrail.features):3} {gate:9} caught {rate.value:.2f} ({low:.2f}-{high:.2f}, {rate.hits} of "
                f"{rate.n}), false positives {sum(r.hits for r in false)} of {sum(r.n for r in false)}, "
                f"worst {max(r.value for r in false):.3f}",
                flush=True,
            )
            if args.questions:
                for row in judge(model, tokenizer, guardrail, starter.questions):
                    d = row.as_dict()
                    print(
                        f"    {d['name']:14} {d['n']:4} {d['unguarded']:.3f} {d['guarded']:.3f} {d['trigger_rate']:.3f}"
                    )


if __name__ == "__main__":
    main()
