"""The gate: token by token, in chunks and whole are the same, for every scorer, accumulator and moment."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference import authors_density, cusum, running_means
from saeguard.gate import Cusum, Density, Evidence, Gate, Mean, Probe
from saeguard.tokens import TokenMasks, token_masks

N, D_MODEL = 5, 8
GENERATOR = torch.Generator().manual_seed(7)
SCORERS = {
    "density": Density(),
    "evidence": Evidence(torch.randn(N, generator=GENERATOR), -0.25),
    "probe": Probe(torch.randn(D_MODEL, generator=GENERATOR), 0.1),
}
ACCUMULATORS = {"mean": Mean(), "cusum": Cusum(0.375)}
PAD, SPECIAL = 0, 1


def tolerance(scorer) -> dict[str, float]:
    """The probe multiplies in float32, whose rounding depends on the shape of the block; the others are in float64."""
    close = 1e-5 if isinstance(scorer, Probe) else 1e-12
    return {"rtol": close, "atol": close}


def texts(seed: int, batch: int, tokens: int, *, left: bool = False) -> tuple[Tensor, Tensor, TokenMasks]:
    """Residual streams (batch, tokens, d_model), activity (batch, tokens, n), masks; sequences of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 8, (batch, tokens), generator=generator)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    places = torch.arange(tokens)
    attended = places >= tokens - lengths if left else places < lengths
    hidden = torch.randn(batch, tokens, D_MODEL, generator=generator)
    active = torch.rand(batch, tokens, N, generator=generator) < 0.15
    return hidden, active, token_masks(ids * attended, attended, torch.tensor([PAD, SPECIAL]))


def part(masks: TokenMasks, start: int, end: int) -> TokenMasks:
    return TokenMasks(*(mask[:, start:end] for mask in (masks.attended, masks.first, masks.valid)))


def read_in(
    gate: Gate, cuts: list[int], threshold: float, case: tuple[Tensor, Tensor, TokenMasks]
) -> tuple[Tensor, Tensor]:
    """Statistic and decision (batch, tokens), read in chunks that end at `cuts`."""
    hidden, active, masks = case
    state, already = gate.accumulator.start(len(hidden)), torch.zeros(len(hidden), dtype=torch.bool)
    found, decided, start = [], [], 0
    for end in [*cuts, hidden.shape[1]]:
        if end > start:
            states, statistics = gate.read(state, hidden[:, start:end], active[:, start:end], part(masks, start, end))
            triggered = gate.decide(statistics, threshold, already)
            state, already, start = states[:, -1], triggered[:, -1], end
            found.append(statistics)
            decided.append(triggered)
    return torch.cat(found, dim=1), torch.cat(decided, dim=1)


@pytest.fixture(scope="module", params=SCORERS)
def scorer(request):
    return SCORERS[request.param]


@pytest.fixture(scope="module", params=ACCUMULATORS)
def accumulator(request):
    return ACCUMULATORS[request.param]


class TestEveryGate:
    """What holds for each scorer with each accumulator."""

    @given(seed=st.integers(0, 999), tokens=st.integers(1, 24), left=st.booleans(), data=st.data())
    def test_in_any_chunks_is_the_whole(self, scorer, accumulator, seed, tokens, left, data):
        case = texts(seed, 3, tokens, left=left)
        cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=5)))
        gate = Gate(
            scorer,
            accumulator,
            latch=data.draw(st.booleans()),
            counts=data.draw(st.sampled_from(["valid", "attended"])),
        )
        threshold = 0.3141
        whole = read_in(gate, [], threshold, case)
        for chunks in (cuts, list(range(1, tokens))):
            statistics, triggered = read_in(gate, chunks, threshold, case)
            torch.testing.assert_close(statistics, whole[0], **tolerance(gate.scorer))
            assert torch.equal(triggered, whole[1])

    @given(seed=st.integers(0, 999))
    def test_a_batch_is_its_rows_one_by_one(self, scorer, accumulator, seed):
        hidden, active, masks = texts(seed, 4, 16)
        gate = Gate(scorer, accumulator)
        _, together = gate.read(gate.accumulator.start(4), hidden, active, masks)
        for row in range(4):
            keep = masks.attended[row]
            alone = TokenMasks(*(mask[row, keep][None] for mask in (masks.attended, masks.first, masks.valid)))
            _, single = gate.read(gate.accumulator.start(1), hidden[row, keep][None], active[row, keep][None], alone)
            torch.testing.assert_close(together[row, keep], single[0], **tolerance(gate.scorer))

    @given(seed=st.integers(0, 999), left=st.booleans())
    def test_statistics_are_those_of_a_loop(self, scorer, accumulator, seed, left):
        hidden, active, masks = texts(seed, 3, 20, left=left)
        gate = Gate(scorer, accumulator)
        _, found = gate.read(gate.accumulator.start(3), hidden, active, masks)
        for row in range(3):
            scores = [token_score(scorer, h, a) for h, a in zip(hidden[row], active[row], strict=True)]
            counted = masks.valid[row].tolist()
            slow = (
                cusum(scores, counted, accumulator.drift)
                if isinstance(accumulator, Cusum)
                else running_means(scores, counted)
            )
            assert found[row].tolist() == pytest.approx(slow, abs=1e-5)

    def test_padding_that_is_not_a_number_changes_nothing(self, scorer, accumulator):
        hidden, active, masks = texts(3, 4, 12, left=True)
        gate = Gate(scorer, accumulator)
        _, clean = gate.read(gate.accumulator.start(4), hidden, active, masks)
        spoiled = torch.where(masks.attended[..., None], hidden, float("nan"))
        _, found = gate.read(gate.accumulator.start(4), spoiled, active, masks)
        assert torch.equal(found, clean)

    def test_before_the_first_valid_token_nothing_triggers_a_positive_threshold(self, scorer, accumulator):
        hidden, active, _ = texts(0, 2, 6)
        none = torch.zeros(2, 6, dtype=torch.bool)
        gate = Gate(scorer, accumulator)
        _, statistics = gate.read(gate.accumulator.start(2), hidden, active, TokenMasks(~none, none, none))
        assert not bool(gate.decide(statistics, 0.0, none[:, 0]).any())


def token_score(scorer, h: Tensor, a: Tensor) -> float:
    if isinstance(scorer, Density):
        return 1.0 if any(a.tolist()) else 0.0
    values = a if isinstance(scorer, Evidence) else h
    return sum(float(w) * float(x) for w, x in zip(scorer.weights, values, strict=True)) + scorer.bias


def walk(*scores: float) -> Tensor:
    return torch.tensor([scores], dtype=torch.float64)


def test_density_is_the_share_of_hot_valid_tokens():
    active = torch.zeros(1, 6, N, dtype=torch.bool)
    active[0, [0, 2, 3], [1, 0, 4]] = True
    ids = torch.tensor([[1, 5, 5, 5, 5, 0]])
    masks = token_masks(ids, ids != PAD, torch.tensor([PAD, SPECIAL]))
    gate = Gate(Density())
    _, found = gate.read(gate.accumulator.start(1), torch.zeros(1, 6, D_MODEL), active, masks)
    assert found[0].tolist() == pytest.approx([-math.inf, 0, 1 / 2, 2 / 3, 1 / 2, 1 / 2])


def test_as_the_authors_count_position_0_is_never_hot_but_in_the_denominator():
    _, active, _ = texts(5, 6, 30)
    ids = torch.full((6, 30), 5)
    masks = token_masks(ids, ids > 0, torch.tensor([PAD, SPECIAL]))
    gate = Gate(Density(), Mean(), "block", "attended")
    _, found = gate.read(gate.accumulator.start(6), torch.zeros(6, 30, D_MODEL), active, masks)
    expected = authors_density(active.double().numpy(), range(N))
    assert gate.sequence_statistic(found).tolist() == pytest.approx(expected.tolist(), rel=1e-15)


def test_as_the_authors_count_a_special_token_can_be_hot():
    ids = torch.tensor([[5, SPECIAL, 5, 5]])
    active = torch.zeros(1, 4, N, dtype=torch.bool)
    active[0, 1, 0] = True
    masks = token_masks(ids, ids > 0, torch.tensor([PAD, SPECIAL]))
    for counts, expected in (("attended", 1 / 4), ("valid", 0.0)):
        gate = Gate(Density(), Mean(), "block", counts)
        _, found = gate.read(gate.accumulator.start(1), torch.zeros(1, 4, D_MODEL), active, masks)
        assert gate.sequence_statistic(found).tolist() == [expected]


def test_running_is_causal_and_block_looks_at_the_end():
    statistics = walk(0.0, 1.0, 0.2, 0.9)
    none = torch.zeros(1, dtype=torch.bool)
    running, block = Gate(Density()), Gate(Density(), moment="block")
    assert running.decide(statistics, 0.5, none).tolist() == [[False, True, True, True]]
    assert block.decide(statistics, 0.5, none).tolist() == [[True] * 4]
    assert block.decide(statistics[:, :3], 0.5, none).tolist() == [[False] * 3]
    assert running.sequence_statistic(statistics).tolist() == [1.0]
    assert block.sequence_statistic(statistics).tolist() == [0.9]


@given(seed=st.integers(0, 999), tokens=st.integers(2, 20), moment=st.sampled_from(["running", "block"]))
def test_sequence_statistic_passes_the_threshold_exactly_when_the_sequence_triggers(seed, tokens, moment):
    hidden, active, masks = texts(seed, 4, tokens)
    gate = Gate(SCORERS["evidence"], Cusum(0.2), moment)
    _, statistics = gate.read(gate.accumulator.start(4), hidden, active, masks)
    triggered = gate.decide(statistics, 0.5, torch.zeros(4, dtype=torch.bool))[:, -1]
    assert torch.equal(triggered, gate.sequence_statistic(statistics) > 0.5)


@given(seed=st.integers(0, 999), tokens=st.integers(2, 20), data=st.data())
def test_later_tokens_never_change_a_running_decision(seed, tokens, data):
    hidden, active, masks = texts(seed, 3, tokens)
    gate = Gate(SCORERS["evidence"], Cusum(0.2))
    end = data.draw(st.integers(1, tokens - 1))
    whole = read_in(gate, [], 0.5, (hidden, active, masks))
    start = read_in(gate, [], 0.5, (hidden[:, :end], active[:, :end], part(masks, 0, end)))
    torch.testing.assert_close(start[0], whole[0][:, :end], **tolerance(gate.scorer))
    assert torch.equal(start[1], whole[1][:, :end])


@pytest.mark.parametrize("moment", ["running", "block"])
def test_latch_holds_to_the_end_and_without_it_a_sequence_recovers(moment):
    gate = Gate(Density(), moment=moment)
    already = torch.tensor([True])
    calm = walk(0.1, 0.1)
    assert gate.decide(calm, 0.5, already).all()
    assert not replace(gate, latch=False).decide(calm, 0.5, already).any()
    assert replace(gate, latch=False, moment="running").decide(walk(0.9, 0.1), 0.5, already).tolist() == [[True, False]]


def test_the_threshold_itself_does_not_trigger():
    none = torch.zeros(1, dtype=torch.bool)
    assert not Gate(Density()).decide(walk(0.5), 0.5, none).any()
    assert Gate(Density()).decide(walk(math.nextafter(0.5, 1)), 0.5, none).all()


@given(st.integers(0, 2000))
def test_cusum_finds_a_burst_after_any_amount_of_ordinary_text(ordinary):
    scores = torch.cat([torch.zeros(1, ordinary), torch.ones(1, 10)], dim=1).double()
    _, found = Cusum(0.5).advance(Cusum(0.5).start(1), scores, torch.ones_like(scores, dtype=torch.bool))
    assert float(found[0, -1]) == pytest.approx(5.0)


def test_only_features_that_speak_for_the_topic_make_a_token_hot():
    evidence = Gate(Evidence(torch.tensor([1.0, -2.0, 0.0, 0.5]), 0.0))
    assert evidence.clamped(4).tolist() == [True, False, False, True]
    assert Gate(Density()).clamped(4).all()
    assert Gate(SCORERS["probe"]).clamped(4).all()
    assert [Gate(scorer).kind for scorer in SCORERS.values()] == list(SCORERS)


def test_first_token_of_a_continued_sequence_is_valid():
    ids = torch.tensor([[5, 6], [5, 6]])
    masks = token_masks(ids, ids > 0, torch.tensor([PAD, SPECIAL]), started=torch.tensor([True, False]))
    assert masks.valid.tolist() == [[True, True], [False, True]]
    assert masks.first.tolist() == [[False, False], [True, False]]
