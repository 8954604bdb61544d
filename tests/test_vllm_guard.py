"""The guard in an engine with continuous batching, without the engine: random schedules against `attach`."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import D_MODEL, make_guardrail, make_sae
from saeguard.clamp import Clamp
from saeguard.errors import AttachError, NonFiniteError, ProofError, UsageError
from saeguard.gate import Cusum, Density, Evidence, Gate, Mean, Probe
from saeguard.hookpoints import HookPoint
from saeguard.hooks import at
from saeguard.model import port_at, residual_stream
from saeguard.serving.proof_texts import ORDINARY, ProofTexts
from saeguard.serving.vllm.book import PROOF, Book, as_dict, place, proof_id
from saeguard.serving.vllm.graph import GraphGuard
from saeguard.serving.vllm.guard import LayerGuard
from saeguard.serving.vllm.loading import parse_guardrails
from saeguard.serving.vllm.proof import check_proof
from saeguard.serving.vllm.slots import Slots, Span
from saeguard.tokens import special_token_ids
from tiny import prompts, same_verdicts, with_rule

LAYER, ROOM = 2, 4
LENGTHS = (1, 2, 9, 17, 30, 41, 5, 23)
EVIDENCE = Evidence(torch.tensor([1.0, 0.7, -0.6, 1.3, 0.4, -0.9]), 0.013)
PROBE = Probe(torch.linspace(-1.0, 1.0, D_MODEL), 0.2)
GATES = {
    "density": Gate(Density()),
    "attended": Gate(Density(), counts="attended"),
    "evidence": Gate(EVIDENCE, Cusum(0.3)),
    "probe": Gate(PROBE, Cusum(1.5)),
    "open again": Gate(EVIDENCE, Mean(), latch=False),
}


@pytest.fixture(scope="module")
def rows():
    """Sequences (1, length) with a special token inside some."""
    rows = prompts(*LENGTHS, seed=3)
    for row in rows[3:6]:
        row[0, 7] = 2
    return rows


@pytest.fixture(scope="module", params=GATES)
def guarded(request, llama, tokenizer, rows):
    """A guardrail under each gate, whose threshold some of the sequences pass, and that clamps from there on."""
    clamp = Clamp("active" if request.param == "probe" else "dense", c=5.0, strength=1.0)
    gate = GATES[request.param]
    silent = make_guardrail(llama, tokenizer, make_sae("jumprelu"), LAYER, gate=gate, threshold=1e9, clamp=clamp)
    with silent.attach(llama, tokenizer) as guard:
        found = sorted(guard.judge(row)[0].statistic for row in rows if row.shape[1] > 2)
    return with_rule(silent, threshold=sum(found[2:4]) / 2, reach="onward")


def make(kind, guardrail, tokenizer, slots=ROOM, **more):
    rules = {rule.name: rule for rule in guardrail.rules}
    options = {"slots": slots, "device": torch.device("cpu"), **more}
    if kind is GraphGuard:
        options["tokens"] = 128
    return kind(guardrail.layer, rules, special_token_ids(tokenizer), **options)


def schedule(lengths: dict[str, int], seed: int) -> Iterator[list[tuple[str, int, int]]]:
    """Steps of at most `ROOM` requests: chunks of any length, requests that pause, start over, end and come."""
    rng = random.Random(seed)
    waiting, running = list(lengths), {}
    while waiting or running:
        while waiting and len(running) < ROOM:
            running[waiting.pop(0)] = 0
        step = []
        for name in rng.sample(sorted(running), rng.randint(1, len(running))):
            if running[name] and rng.random() < 0.15:
                running[name] = 0
            count = min(lengths[name] - running[name], rng.choice([1, 1, 2, 5, 40]))
            step.append((name, running[name], count))
            running[name] += count
        yield step
        running = {name: read for name, read in running.items() if read < lengths[name]}


def run(guard: LayerGuard, rows: list[Tensor], streams: list[Tensor], seed: int, *, padding: int = 0):
    """Feed random steps; the streams that came out, and the verdicts."""
    book = Book([guard], slots=ROOM)
    book.proven = True
    out = [stream.clone() for stream in streams]
    lengths = {f"r{i}": row.shape[1] for i, row in enumerate(rows)}
    for step in schedule(lengths, seed):
        pieces = [(int(name[1:]), slice(position, position + count)) for name, position, count in step]
        book.begin(step, torch.cat([rows[i][0, part] for i, part in pieces]))
        block = torch.cat([*(streams[i][part] for i, part in pieces), torch.full((padding, D_MODEL), 3.0)])
        result = guard.guard(block)
        book.end()
        new, where = (block, torch.zeros(len(block), dtype=torch.bool)) if result is None else result
        assert torch.equal(new[~where], block[~where])
        assert not where[len(block) - padding :].any()
        start = 0
        for i, part in pieces:
            length = part.stop - part.start
            out[i][part] = new[start : start + length]
            start += length
        book.finish(name for name, position, count in step if position + count == lengths[name])
    return out, [book.verdicts(name)[name][0] for name in lengths]


@pytest.fixture(scope="module")
def expected(guarded, llama, tokenizer, rows):
    """Residual streams without guard, with it, and the verdicts, as `attach` has them."""
    ones = [torch.ones_like(row) for row in rows]
    plain = [residual_stream(llama, LAYER, row, one)[0] for row, one in zip(rows, ones, strict=True)]
    with guarded.attach(llama, tokenizer) as guard:
        clamped, verdicts = [], []
        for row, one in zip(rows, ones, strict=True):
            clamped.append(residual_stream(llama, LAYER, row, one)[0])
            verdicts += guard.verdicts
    assert {v.triggered for v in verdicts} == {True, False}
    return plain, clamped, verdicts


@pytest.mark.parametrize("kind", [LayerGuard, GraphGuard])
@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_decides_and_clamps_as_attach_does(kind, seed, guarded, tokenizer, rows, expected):
    plain, clamped, verdicts = expected
    out, found = run(make(kind, guarded, tokenizer), rows, plain, seed, padding=seed)
    same_verdicts(found, verdicts)
    for mine, theirs in zip(out, clamped, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", [LayerGuard, GraphGuard])
def test_a_rule_that_reaches_back_clamps_the_chunk_that_triggers(kind, guarded, llama, tokenizer, rows, expected):
    back = with_rule(guarded, reach="all")
    plain, clamped, _ = expected
    seen: list[Tensor] = []
    with back.attach(llama, tokenizer), at(port_at(llama, HookPoint(LAYER)), lambda values: seen.append(values[0])):
        for row in rows:
            llama(row, logits_to_keep=1)
    guard = make(kind, back, tokenizer)
    for row, stream, whole in zip(rows, plain, seen, strict=True):
        guard.begin([Span(1, 0, row.shape[1], 0)], row[0])
        result = guard.guard(stream.clone())
        guard.end()
        torch.testing.assert_close(stream if result is None else result[0], whole)
    differs = any(not torch.equal(whole, onward) for whole, onward in zip(seen, clamped, strict=True))
    assert differs == back.rule.reaches_back


def test_several_rules_act_in_one_pass(guarded, llama, tokenizer, rows, expected):
    plain, _, verdicts = expected
    silent = with_rule(guarded, name="silent", threshold=1e9).rule
    watched = with_rule(guarded, name="watched", action="monitor").rule
    several = replace(guarded, rules=(silent, guarded.rule, watched))
    once, _ = run(make(LayerGuard, guarded, tokenizer), rows, plain, 0)
    for kind in (LayerGuard, GraphGuard):
        guard = make(kind, several, tokenizer)
        out, found = run(guard, rows, plain, 0)
        assert not any(verdict.triggered for verdict in found)
        for mine, theirs in zip(out, once, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert any(verdict.triggered for verdict in verdicts)


def test_what_is_not_announced_or_does_not_run_is_an_error(guardrail, tokenizer):
    guard = make(LayerGuard, guardrail, tokenizer)
    with pytest.raises(AttachError, match="whose tokens"):
        guard.guard(torch.zeros(2, D_MODEL))
    guard.begin([Span(1, 0, 2, 0)], torch.tensor([1, 9]))
    with pytest.raises(AttachError, match="without its layer"):
        guard.end()
    captured = make(GraphGuard, guardrail, tokenizer)
    captured.begin([Span(1, 0, 2, 0)], torch.tensor([1, 9]))
    captured.end()
    with pytest.raises(AttachError, match="without its layer"):
        captured.begin([Span(1, 0, 1, 2)], torch.tensor([9]))


@pytest.mark.parametrize("kind", [LayerGuard, GraphGuard])
def test_a_stream_that_is_not_finite_stops_the_engine(kind, guardrail, tokenizer):
    guard, stream = make(kind, guardrail, tokenizer), torch.zeros(2, D_MODEL)
    stream[1, 3] = float("nan")
    steps = ([Span(1, 0, 2, 0)], torch.tensor([1, 9])), ([Span(1, 0, 1, 2)], torch.tensor([9]))

    def serve() -> None:
        for step in steps:
            guard.begin(*step)
            guard.guard(stream)
            guard.end()

    with pytest.raises(NonFiniteError):
        serve()


def test_an_unannounced_pass_changes_nothing_in_a_graph(guarded, tokenizer, expected):
    guard, block = make(GraphGuard, guarded, tokenizer), expected[0][4]
    before = [memory.state[1:].clone() for memory in guard.memories.values()]
    new, where = guard.guard(block)
    assert torch.equal(new, block)
    assert not where.any()
    for memory, state in zip(guard.memories.values(), before, strict=True):
        assert torch.equal(memory.state[1:], state)
    guard.begin([Span(1, 0, 1, 0)], torch.tensor([1]))


@pytest.mark.filterwarnings("ignore")
def test_the_operator_holds_torchs_rules_and_compiles_whole(llama, tokenizer, expected, guarded):
    always = with_rule(guarded, threshold=-1e9)
    guard, block = make(GraphGuard, always, tokenizer), expected[0][4]
    spans, ids = [Span(1, 0, 20, 0), Span(2, 20, 10, 0)], torch.full((30,), 9)
    guard.begin(spans, ids)
    torch.library.opcheck(torch.ops.saeguard.guard, (block, guard.key))
    plain, where = torch.ops.saeguard.guard(block, guard.key)
    assert where.any()

    def layer(hidden: Tensor, residual: Tensor) -> Tensor:
        new, _ = torch.ops.saeguard.guard(hidden + residual, guard.key)
        return new * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(block / 2, block / 2), plain * 2)


def test_slots_follow_requests():
    slots = Slots(2)
    assert slots.begin([("a", 0, 3), ("b", 0, 1)]) == [Span(1, 0, 3, 0), Span(2, 3, 1, 0)]
    assert slots.begin([("b", 1, 2), ("a", 3, 1)]) == [Span(2, 0, 2, 1), Span(1, 2, 1, 3)]
    assert slots.begin([("a", 0, 4)]) == [Span(1, 0, 4, 0)], "preempted, starts over"
    with pytest.raises(AttachError, match="found number 6, expected number 4"):
        slots.begin([("a", 6, 1)])
    with pytest.raises(AttachError, match="request new: found number 16, expected number 0"):
        slots.begin([("new", 16, 1)])


def test_the_longest_waiting_request_loses_its_slot_and_must_start_over():
    slots = Slots(2)
    slots.begin([("a", 0, 3), ("b", 0, 3)])
    slots.begin([("a", 3, 1)])
    assert slots.begin([("c", 0, 2), ("a", 4, 1)]) == [Span(2, 0, 2, 0), Span(1, 2, 1, 4)]
    with pytest.raises(AttachError):
        slots.begin([("b", 3, 1)])
    slots.finish(["c", "unknown"])
    assert slots.live() == ("a",)


def test_nothing_is_admitted_before_the_proof(guardrail, tokenizer, llama):
    guard = make(LayerGuard, guardrail, tokenizer)
    book = Book([guard], slots=ROOM)
    with pytest.raises(ProofError, match="before the start-up proof"):
        book.begin([("r", 0, 1)], torch.tensor([9]))
    name = guardrail.rule.name
    with pytest.raises(ProofError, match="read 0 times"):
        book.prove({name: 2})
    rows = [row for row in prompts(41, 2, seed=3)]
    for i, row in enumerate(rows):
        request = f"{proof_id(name, i)}-0a1b2c3d"
        assert request.startswith(PROOF)
        book.begin([(request, 0, row.shape[1])], row[0])
        guard.guard(residual_stream(llama, LAYER, row, torch.ones_like(row))[0])
        book.finish([request])
    seen = [book.verdicts(proof_id(name, i)) for i in range(2)]
    if [v[0].triggered for found in seen for v in found.values()] == [True, False]:
        book.prove({name: 2})
        assert book.proven
    else:
        with pytest.raises(ProofError):
            book.prove({name: 2})
        assert not book.proven


def test_proof_texts_come_from_the_guardrail(guardrail):
    passage = {"before": "the ", "token": "star", "after": " is far", "activation": 1.0}
    rows = [{**passage, "corpus": "wiki"}, {**passage, "corpus": "forget"}]
    made = with_rule(guardrail, evidence={"passages": {"3": rows}}).rule
    assert ProofTexts.of(made).all() == ("the star is far", *ORDINARY)
    with pytest.raises(ProofError, match="no text that must fire"):
        ProofTexts.of(with_rule(guardrail, evidence={}).rule)


def test_the_proof_needs_both(guardrail, tokenizer):
    quiet = make(LayerGuard, guardrail, tokenizer).verdicts(1)[0]
    loud = replace(quiet, triggered=True)
    check_proof("topic", [loud, loud, quiet])
    for failed in ([quiet, quiet], [loud, loud, loud]):
        with pytest.raises(ProofError, match="topic"):
            check_proof("topic", failed)


def test_verdicts_are_found_by_the_clients_id_in_the_order_of_the_answer(guardrail, tokenizer):
    book = Book([make(LayerGuard, guardrail, tokenizer, slots=8)], slots=8)
    book.proven = True
    own = ["1_cmpl-a-10-00000000", "0_cmpl-a-10-00000000", "cmpl-a-2-0123abcd"]
    book.begin([(name, 0, 1) for name in [*own, "cmpl-ab-0-00000000", "cmpl-b"]], torch.full((5,), 9))
    assert set(book.verdicts("cmpl-a")) == set(own)
    assert sorted(own, key=place) == own[::-1]
    assert set(book.verdicts("cmpl-b")) == {"cmpl-b"}
    verdict = as_dict(book.verdicts("cmpl-b")["cmpl-b"][0])
    assert verdict["statistic"] in (None, 0.0)
    assert verdict["triggered"] is False


def test_guardrails_of_the_environment():
    assert parse_guardrails("a=x/y, b=z=1") == {"a": "x/y", "b": "z=1"}
    for wrong in ("", "a", "a=", "=x", "a=x,a=y"):
        with pytest.raises(UsageError):
            parse_guardrails(wrong)
