"""`attach`: a guardrail on a user's own model, for as long as a `with` block lasts.

Before each forward pass of the model: which tokens are these, and what is known of their sequences. At the hook point
in the guarded layer: read the gate, decide, clamp. A pass in which nothing triggers leaves every tensor untouched, so
its logits are bit-identical to the unguarded model's. Since the clamp acts behind what the gate reads, what the gate
sees never depends on whether it has clamped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import Cache

from saeguard.errors import AttachError, NonFiniteError
from saeguard.gate import Density, Gate
from saeguard.guardrail import Guardrail
from saeguard.hooks import around, at, inputs_of
from saeguard.model import decoder_layer, entrances, port_at, run_to
from saeguard.normalise import Rereader
from saeguard.rule import Rule
from saeguard.sae.slim import SlimEncoder
from saeguard.sequences import RuleTrack, Track, recall, remember
from saeguard.tokens import TokenMasks, attended_tokens, special_token_ids, token_masks, without_padding
from saeguard.verdicts import Verdict as Verdict
from saeguard.verdicts import refused, verdicts


class Guard:
    """A guardrail at work. `verdicts` has one entry for each sequence of the last forward pass."""

    def __init__(self, guardrail: Guardrail, model: nn.Module, tokenizer: Any, *, normalise: bool = False) -> None:
        self.guardrail = guardrail
        self._read_again = Rereader(tokenizer) if normalise else None
        self._model = model
        self._special_ids = special_token_ids(tokenizer)
        self._key = uuid4().hex
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
        self._live = cache(self._rules_on)
        self._pass: _Pass | None = None
        self._tracks: dict[str, Track] = {}
        self.clamping: Tensor | None = None
        """Which rules may clamp which rows (rows, rules) of the passes to come; None: all of them. Gates read on."""

    def _rules_on(self, device: torch.device) -> tuple[list[_LiveRule], Tensor]:
        """The rules and the ids of special tokens, on the device on which the layer turns out to run."""
        return [_LiveRule.of(rule, device) for rule in self.guardrail.rules], torch.tensor(
            self._special_ids, device=device
        )

    @property
    def verdicts(self) -> list[Verdict]:
        """One verdict a sequence: of several rules, the one furthest over (or nearest to) its threshold."""
        return [max(row, key=lambda v: (v.triggered, v.statistic - v.threshold)) for row in self.all_verdicts]

    @property
    def all_verdicts(self) -> list[list[Verdict]]:
        """For each sequence of the last pass, the verdict of every rule."""
        return [] if self.last is None else verdicts(self.last, self.guardrail.rules)

    @property
    def refusals(self) -> list[bool]:
        """For each sequence of the last pass, whether its answer is the refusal."""
        return [refused(self.guardrail.rules, row) for row in self.all_verdicts]

    @property
    def last(self) -> Track | None:
        """What is known of the sequences of the last pass."""
        return self._tracks.get(self._key)

    def track(self, kv: Cache, rows: int) -> Track:
        """What is known of the sequences in a cache of that many rows, all of whose tokens this guard has seen."""
        track = recall(kv, self._key, rows)
        if track is None:
            raise AttachError("the cache is empty: nothing is known of its sequences")
        return track

    def judge(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Verdict]:
        """Verdicts on whole token sequences (batch, tokens), by a pass that stops at the guarded layer.

        Use it after beam search, where the rows of the last pass are beams and not the sequences returned. Without
        a mask, padding tokens at both ends are left out, unless they are also end-of-sequence tokens.
        """
        mask = without_padding(input_ids, self._pad) if attention_mask is None else attention_mask
        right = mask.argsort(dim=1, descending=True, stable=True)
        self._tracks = {}
        with torch.inference_mode():
            run_to(self._model, self.guardrail.layer, input_ids.gather(1, right), mask.gather(1, right))
        return self.verdicts

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the model and each part of it that holds the layers: note which tokens come.

        The outermost part that is given `input_ids` opens the pass; the parts inside it find it open.
        """
        inputs = inputs_of(module, args, kwargs)
        ids = inputs.get("input_ids")
        if self._pass is not None or not isinstance(ids, Tensor):
            return
        track = recall(inputs.get("past_key_values"), self._key, len(ids))
        past = ids.new_zeros(len(ids), 0, dtype=torch.bool) if track is None else track.attended.to(ids.device)
        attended = attended_tokens(inputs.get("attention_mask"), ids, past).to(ids.device)
        presumed = None if track is not None else self._by_normalised(ids, attended)
        self._pass = _Pass(module, ids, attended, track, presumed)

    def _by_normalised(self, ids: Tensor, attended: Tensor) -> Tensor | None:
        """Which rules (rows, rules) trigger on the normalised form of new sequences, read on its own; None: none do."""
        again = None if self._read_again is None else self._read_again(ids, attended)
        if again is None:
            return None
        read, self._read_again, before = self._read_again, None, self._tracks
        try:
            self.judge(again.ids, again.mask)
            if self.last is None:
                return None
            found = [[verdict.triggered for verdict in row] for row in self.all_verdicts]
        finally:
            self._read_again, self._tracks = read, before
        return torch.tensor(found, device=ids.device) & again.changed[:, None]

    def after_model(self, module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        """Hook after the model: a pass that ended well has gone through the guarded layer."""
        if self._pass is None or self._pass.module is not module:
            return
        done, self._pass = self._pass.stage == "written", None
        if output is not None and not done:
            raise AttachError(f"the model ran without its layer {self.guardrail.layer}: nothing was guarded")

    def before_layer(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the guarded layer: note the cache, which the model may only now have made."""
        if self._pass is None or self._pass.stage != "begun":
            raise AttachError(
                "the guarded layer ran without `input_ids`, or outside the model it is guarded in. Call the model "
                "itself, with `input_ids`: without them special tokens cannot be told apart."
            )
        caches = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
        self._pass = replace(self._pass, caches=caches, stage="in the layer")

    def see(self, values: Tensor) -> Tensor | None:
        """At the hook point that is encoded: gate, decide, and work out the clamp; apply it if it is decoded there."""
        now = self._at_stage("in the layer").on(values.device)
        hidden = values.view(*now.ids.shape, -1)
        if not bool((hidden.sum(dim=-1, dtype=torch.float32).isfinite() | ~now.attended).all()):
            raise NonFiniteError(f"{self.guardrail.point} holds NaN or infinite values")
        rules, special = self._live(values.device)
        masks = token_masks(now.ids, now.attended, special, started=now.started)
        activations = [rule.encoder(hidden) for rule in rules]
        records, delta, where = [], None, torch.zeros_like(now.attended)
        for i, (rule, a) in enumerate(zip(rules, activations, strict=True)):
            record = rule.read(hidden, a, masks, None if now.track is None else now.track.rules[i])
            if now.presumed is not None:
                record = replace(record, triggered=record.triggered | now.presumed[:, i, None].to(hidden.device))
            records.append(record)
            hot = rule.hot(a, masks) & record.triggered
            if self.clamping is not None:
                hot &= self.clamping[:, i, None].to(hot.device)
            if rule.clamps and bool(hot.any()):
                change = torch.where(hot[..., None], rule.delta(a), 0.0)
                delta = change if delta is None else delta + change
                where |= hot
        active = torch.cat([a > 0 for a in activations], dim=-1) & masks.valid[..., None]
        self._remember(Track(now.attended, active, tuple(records)), now)
        self._pass = replace(now, stage="seen", change=None if delta is None else (delta, where))
        return self.write(values) if self.guardrail.hook_out == self.guardrail.hook else None

    def write(self, values: Tensor) -> Tensor | None:
        """At the hook point that is decoded: apply the clamp. None where nothing changes."""
        now = self._at_stage("seen")
        self._pass = replace(now, stage="written", change=None)
        if now.change is None:
            return None
        delta, where = (part.to(values.device) for part in now.change)
        hidden = values.view(*now.ids.shape, -1)
        return torch.where(where[..., None], (hidden + delta).to(hidden.dtype), hidden).view_as(values)

    def _at_stage(self, stage: str) -> _Pass:
        if self._pass is None or self._pass.stage != stage:
            found = "no pass" if self._pass is None else self._pass.stage
            raise AttachError.mismatch(
                f"order in which the parts of layer {self.guardrail.layer} ran",
                found=found,
                expected=stage,
                fix=f"{self.guardrail.hook} cannot be guarded in this model.",
            )
        return self._pass

    def _remember(self, new: Track, now: _Pass) -> None:
        track = new if now.track is None else now.track.followed_by(new)
        self._tracks = {self._key: track}
        for kv in now.caches:
            self._tracks = remember(kv, self._key, track)


@dataclass(frozen=True)
class _Pass:
    """One forward pass of `module`: ids and attention (batch, tokens), the track of what came before, which rules
    (batch, rules) have triggered already, the caches that will hold it, how far it has come, and the clamp's change
    that is still to be applied, with where."""

    module: nn.Module
    ids: Tensor
    attended: Tensor
    track: Track | None
    presumed: Tensor | None = None
    caches: tuple[Cache, ...] = ()
    stage: Literal["begun", "in the layer", "seen", "written"] = "begun"
    change: tuple[Tensor, Tensor] | None = None

    @property
    def started(self) -> Tensor:
        if self.track is None:
            return torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        return self.track.started

    def on(self, device: torch.device) -> _Pass:
        """The same with its ids and masks on the device of the guarded layer."""
        track = None if self.track is None else self.track.map(lambda part: part.to(device))
        return replace(self, ids=self.ids.to(device), attended=self.attended.to(device), track=track)


@dataclass(frozen=True)
class _LiveRule:
    """A rule with its tensors on the layer's device; `mask` (n,) are the features that make a token hot."""

    rule: Rule
    encoder: SlimEncoder
    decoder: Tensor
    gate: Gate
    mask: Tensor

    @classmethod
    def of(cls, rule: Rule, device: torch.device) -> _LiveRule:
        mask = rule.gate.clamped(len(rule.selected))
        return cls(
            rule, rule.encoder.to(device), rule.decoder[mask].to(device), _gate_to(rule.gate, device), mask.to(device)
        )

    @property
    def clamps(self) -> bool:
        return self.rule.action != "monitor"

    def read(self, hidden: Tensor, a: Tensor, masks: TokenMasks, past: RuleTrack | None) -> RuleTrack:
        """Gate state, statistic and decision after each token of this pass."""
        batch = len(hidden)
        state = self.gate.accumulator.start(batch) if past is None else past.states[:, -1]
        already = hidden.new_zeros(batch, dtype=torch.bool) if past is None else past.triggered[:, -1]
        states, statistics = self.gate.read(state.to(hidden.device), hidden.detach(), a > 0, masks)
        return RuleTrack(states, statistics, self.gate.decide(statistics, self.rule.threshold, already))

    def hot(self, a: Tensor, masks: TokenMasks) -> Tensor:
        """Hot tokens (batch, tokens)."""
        return (a[..., self.mask] > 0).any(dim=-1) & self.gate.eligible(masks)

    def delta(self, a: Tensor) -> Tensor:
        """The clamp's change (batch, tokens, d_model) for activations (batch, tokens, n)."""
        return self.rule.clamp.delta(a[..., self.mask], self.decoder)


@contextmanager
def attach(guardrail: Guardrail, model: nn.Module, tokenizer: Any, *, normalise: bool = False) -> Iterator[Guard]:
    """Guard `model` inside the block; afterwards it is as it was, whatever happened.

    Works for `model(...)`, `generate` in all its modes, pipelines and evaluation harnesses. Everything is
    checked before a hook is placed: a guardrail that does not fit raises and guards nothing, ever half.

    `normalise`: a prompt whose normalised form (normalise.py) differs is read in that form too, up to the guarded
    layer; what triggers there has triggered from the first token on. The model sees the prompt as it is.
    """
    guardrail.check(model, tokenizer)
    guard = Guard(guardrail, model, tokenizer, normalise=normalise)
    with ExitStack() as stack:
        for module in entrances(model):
            stack.enter_context(around(module, guard.before_model, guard.after_model))
        stack.enter_context(around(decoder_layer(model, guardrail.layer), guard.before_layer))
        stack.enter_context(at(port_at(model, guardrail.point), guard.see))
        if guardrail.hook_out != guardrail.hook:
            stack.enter_context(at(port_at(model, replace(guardrail.point, hook=guardrail.hook_out)), guard.write))
        yield guard


def _gate_to(gate: Gate, device: torch.device) -> Gate:
    scorer = gate.scorer
    if isinstance(scorer, Density):
        return gate
    moved = type(scorer)(scorer.weights.to(device), scorer.bias)
    return Gate(moved, gate.accumulator, gate.moment, gate.counts, gate.latch)
