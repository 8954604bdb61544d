"""How often `--normalise` changes ordinary text, what triggers then that did not before, and what it costs.

    python benchmarks/normalising.py GUARDRAIL [--texts wikipedia=FILE law=FILE ...] [--most 300]

On the embedded model: the starter set's retain texts and its questions off the topic, and the texts named. What is not
changed is judged as without. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from functools import cache
from itertools import islice

import torch

from saeguard import Guardrail
from saeguard.corpus import read_texts
from saeguard.embedded import TOPIC, embedded_model, starter_set
from saeguard.normalise import normalised
from saeguard.windows import pad_rows, text_ids


def triggered(model, tokenizer, guardrail: Guardrail, texts: list[str], *, normalise: bool) -> int:
    """How many texts trigger, each cut after 256 tokens."""
    with guardrail.attach(model, tokenizer, normalise=normalise) as guard:
        rows = [text_ids(tokenizer, text)[:256] for text in texts]
        return sum(guard.judge(*pad_rows([row]))[0].triggered for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guardrail")
    parser.add_argument("--texts", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--most", type=int, default=300, help="texts of each file, each cut after 1,500 characters")
    args = parser.parse_args()
    (model, tokenizer), starter = embedded_model(), starter_set()
    guardrail = Guardrail.from_pretrained(args.guardrail)
    files = {**starter.retain, **dict(name.split("=", 1) for name in args.texts)}
    its = {name: list(islice(read_texts(str(path)), args.most)) for name, path in files.items()}
    its["questions off the topic"] = [q.text for name, qs in starter.questions.items() if name != TOPIC for q in qs]
    count = cache(lambda word: len(text_ids(tokenizer, f" {word}")))
    torch.set_grad_enabled(False)
    print("| texts | n | changed | of these trigger: as they are | and normalised | ms for 1,000 words |")
    print("|---|---|---|---|---|---|")
    for name, texts in its.items():
        begun = time.perf_counter()
        cut = [text[:1500] for text in texts]
        changed = [text for text in cut if normalised(text, count) != text]
        cost = 1e6 * (time.perf_counter() - begun) / sum(len(text.split()) for text in cut)
        rates = [triggered(model, tokenizer, guardrail, changed, normalise=also) for also in (False, True)]
        print(f"| {name} | {len(cut)} | {len(changed)} | {rates[0]} | {rates[1]} | {cost:.0f} |", flush=True)


if __name__ == "__main__":
    main()
