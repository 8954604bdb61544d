"""Is a topic held better by clamping at several layers, and what does that cost? The procedure of quickstart.

    python benchmarks/several_saes.py SAE_FOLDER... [--alone 12] [--together 6+12 6+9+12] [--work DIR] [--limit N]

The SAE of each folder says its layer; that of the package, on layer 6, is always there. Layer 6 alone, and with a clamp
twice as strong, which moves the stream as far as two do; others alone (default: all); then those named together
(default: layer 6 with each deeper one), with a gate of their own each and with the first one's for all
(several_ways.py).

Printed in Markdown: held-out passages; questions; open answers, perplexity of held-out text, and what an attacker with
the model gets by taking out the direction of the clamp, behind the first layer alone and behind each; the cost.
Attacked are the questions of the test side that a way blocks; directions are found on the dev side. `--work` keeps fits
and answers, and a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from second_model import print_table, with_clamp
from several_ways import Fitted, Way, fitted, jointly

from saeguard.attacks import steering
from saeguard.attacks.attack import CLEAN
from saeguard.attacks.campaign import Campaign
from saeguard.attacks.config import AttackConfig
from saeguard.attacks.success import Pair, outcome
from saeguard.attacks.task import Attacked, attacked
from saeguard.calibration import Rate
from saeguard.embedded import LAYER, NEAR, TOPIC, embedded_model, embedded_sae
from saeguard.evaluation.catalogue import named_benchmark
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.sources import QuestionSet
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.task import Record, split
from saeguard.evaluation.tasks.multiple_choice import MultipleChoice, QuestionItem, question_items
from saeguard.evaluation.tasks.open import OpenAnswers
from saeguard.evaluation.tasks.perplexity import Perplexity
from saeguard.quickstart import STRENGTH
from saeguard.sae import SparseAutoencoder

UNGUARDED = "unguarded"
OPEN, TEXTS = 60, 20
"""Questions that are answered freely, and held-out texts of each domain for perplexity."""
PREFILL, PAST, STEPS = 256, 64, 16


def main() -> None:
    """Fit, judge, attack, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="+")
    parser.add_argument("--alone", type=int, nargs="*")
    parser.add_argument("--together", nargs="*")
    parser.add_argument("--work", type=Path, default=Path("several.work"))
    parser.add_argument("--limit", type=int, help="at most this many questions and texts of each domain")
    parser.add_argument("--pairs", type=int, default=15, help="rounds of timing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = embedded_model(device="cpu")
    saes = {LAYER: embedded_sae()} | {sae.layer or 0: sae for sae in map(SparseAutoencoder.load, args.saes)}
    parts = {layer: fitted(model, tokenizer, sae, layer, args.work) for layer, sae in sorted(saes.items())}
    others = [layer for layer in parts if layer != LAYER]
    alone = others if args.alone is None else args.alone
    together = args.together or [f"{LAYER}+{layer}" for layer in others if layer > LAYER]
    ways = [*ways_alone(parts, alone), *(way for name in together for way in ways_together(name, parts))]
    loader = Loader(lambda: (model, tokenizer))
    print_passages(ways)
    print_questions(ways, loader, args.work, args.limit)
    print_rest(ways, loader, args.work, args.limit)
    print_cost(ways, model, tokenizer, args.pairs)


def ways_alone(parts: dict[int, Fitted], others: Sequence[int]) -> Iterator[Way]:
    """The layer of quickstart by itself, and again with twice the clamp, and others."""
    first = parts[LAYER]
    norm = first.guardrail.evidence["median_residual_norm"]
    yield Way(str(LAYER), (first,), (first.guardrail,))
    yield Way(f"{LAYER}, clamp twice", (first,), (with_clamp(first.guardrail, 2 * STRENGTH * norm, 2 * STRENGTH),))
    yield from (Way(str(layer), (parts[layer],), (parts[layer].guardrail,)) for layer in others)


def ways_together(name: str, parts: dict[int, Fitted]) -> Iterator[Way]:
    """Layers that are named as in 6+12, by their own gates and by the first one's."""
    some = tuple(parts[layer] for layer in sorted(map(int, name.split("+"))))
    yield Way(f"{name}, own gates", some, jointly(some))
    yield Way(f"{name}, one gate", some, tuple(part.guardrail for part in some), one_gate=True)


def print_passages(ways: Sequence[Way]) -> None:
    """Held-out passages that trigger."""
    rows = []
    for way in ways:
        caught, false = way.caught()
        worst = max(false, key=lambda name: false[name].value)
        mean = sum(rate.value for rate in false.values()) / len(false)
        rows.append([way.name, f"{caught.value:.3f}", f"{false[worst].value:.3f} ({worst})", f"{mean:.3f}"])
    print_table(["layers", "topic caught", "worst corpus", "mean of corpora"], rows)


def print_questions(ways: Sequence[Way], loader: Loader, work: Path, limit: int | None) -> None:
    """Accuracy and triggers on all questions of the starter set."""
    subjects = [Subject(UNGUARDED, loader), *(way.subject(loader) for way in ways)]
    (run,) = evaluate(
        subjects,
        [MultipleChoice(named_benchmark("starter", None)[0])],
        Settings("all", limit),
        work=work,
        show_progress=True,
    )
    groups = [*([domain] for domain in (TOPIC, *NEAR)), list({r.domain for r in run.items} - {TOPIC, *NEAR})]
    rows = []
    for name, records in run.records.items():
        cells = [name]
        for domains in groups:
            its = [record for record in records if record.domain in domains]
            right = Rate(sum(bool(r.scores["accuracy"]) for r in its), len(its)).value
            triggered = "" if its[0].triggered is None else f", {100 * rate(r.triggered for r in its).value:.0f} %"
            cells.append(f"{right:.3f}{triggered}")
        rows.append(cells)
    print_table(["layers: accuracy, triggered", TOPIC, *NEAR, "far"], rows)


def print_rest(ways: Sequence[Way], loader: Loader, work: Path, limit: int | None) -> None:
    """Open answers, perplexity, and what comes back once directions are taken out."""
    questions, texts = named_benchmark("starter", None)
    topic = next(each for each in questions if each.name == TOPIC)
    some = tuple(each for each in texts if each.name in (TOPIC, *NEAR))
    subjects = [Subject(UNGUARDED, loader), *(way.subject(loader) for way in ways)]
    (answered,) = evaluate(
        subjects,
        [OpenAnswers((topic,))],
        Settings(limit=limit or OPEN),
        work=work,
        show_progress=True,
    )
    reading = Perplexity(some, frozenset(each.name for each in some))
    (read,) = evaluate(subjects, [reading], Settings("all", limit or TEXTS), work=work, show_progress=True)
    campaign = Campaign(subjects, [topic], AttackConfig(limit=limit), work)
    campaign.run(())
    rows = []
    for way in (None, *ways):
        name = UNGUARDED if way is None else way.name
        its = answered.records[name]
        cells = [name, *(f"{rate(r.scores[key] for r in its).value:.2f}" for key in ("match", "gibberish"))]
        cells.append(f"{perplexity([r for r in read.records[name] if r.domain == TOPIC]):,.0f}")
        cells.append(f"{perplexity([r for r in read.records[name] if r.domain != TOPIC]):,.1f}")
        cells += ["", "", ""] if way is None else after_removal(way, campaign, topic)
        rows.append(cells)
    heads = ["layers", "open answers: match", "gibberish", "perplexity, topic", "near"]
    print_table([*heads, "blocked", "back, removed behind the first", "behind each"], rows)


def after_removal(way: Way, campaign: Campaign, topic: QuestionSet) -> list[str]:
    """How many questions are blocked, and what comes back of them."""
    unguarded, subject = (next(s for s in campaign.subjects if s.name == name) for name in (UNGUARDED, way.name))
    dev = [item for item in split(question_items([topic]))[0].items if isinstance(item, QuestionItem)]
    blocked = campaign.clean.blocked[way.name].blocked
    items = [item for item in question_items([topic]) if item.id in blocked]
    asked = tuple(attacked(CLEAN, items, campaign.config.seed))
    found = []
    for guardrails in (way.guardrails[:1], way.guardrails):
        other = subject
        for guardrail in guardrails:
            other = steering.steered("direction-removed", other, guardrail, dev, 0, campaign.work)
        task = Attacked(f"removed behind {len(guardrails)}", asked)
        (run,) = evaluate([unguarded, other], [task], Settings("all"), work=campaign.work, show_progress=True)
        pair = Pair.of(run.records[UNGUARDED], run.records[way.name])
        success = outcome(blocked, campaign.clean.pairs[way.name], pair)["success"]
        found.append(f"{success['value']:.2f} ({success['low']:.2f} to {success['high']:.2f})")
    return [str(len(blocked)), *found]


def print_cost(ways: Sequence[Way], model: Any, tokenizer: Any, pairs: int) -> None:
    """Bytes, the fit, and a prompt's pass and a token's, triggered, in pairs with none.

    Times are of the processor: other work on the machine bends those least.
    """
    modes: dict[str, Any] = {UNGUARDED: nullcontext}
    modes |= {way.name: lambda way=way.triggered: way.attach(model, tokenizer) for way in ways}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in modes}
    for round_ in range(pairs + 1):
        for name, mode in modes.items():
            passes = timed(model, mode())
            if round_:  # the first round is slower than any other
                times[name].append(passes)
    rows = []
    for way in ways:
        size = sum(file.stat().st_size for part in way.parts for file in part.folder.glob("*.safetensors"))
        seconds = sum(part.seconds for part in way.parts)
        both = [median(a[i] / b[i] for a, b in zip(times[way.name], times[UNGUARDED], strict=True)) for i in (0, 1)]
        rows.append([way.name, f"{size / 1000:.0f}", f"{seconds:.0f}", *(f"{100 * (one - 1):+.1f} %" for one in both)])
    print_table(
        ["layers", "kB of tensors", "core-seconds of fit", f"prompt of {PREFILL} tokens", "each token written"], rows
    )


def timed(model: Any, mode: AbstractContextManager[Any]) -> tuple[float, float]:
    """Processor seconds of a prompt's pass, and of a step of writing after a short one."""
    ids = torch.randint(100, 1000, (1, PREFILL), generator=torch.Generator().manual_seed(0)).to(model.device)
    with mode, torch.inference_mode():
        begun = time.process_time()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        prompt = time.process_time() - begun
        cache = model(input_ids=ids[:, :PAST], use_cache=True, logits_to_keep=1).past_key_values
        begun = time.process_time()
        for _ in range(STEPS):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        return prompt, (time.process_time() - begun) / STEPS


def rate(hits: Any) -> Rate:
    """A share."""
    found = [bool(hit) for hit in hits]
    return Rate(sum(found), len(found))


def perplexity(records: Sequence[Record]) -> float:
    """Of texts together."""
    return math.exp(sum(r.scores["nats"] for r in records) / sum(r.scores["tokens"] for r in records))


if __name__ == "__main__":
    main()
