"""`attach`: a guardrail on a user's own model, for as long as a `with` block lasts.

Before each forward pass of the model: which tokens are these, and what is known of their sequences. At the hook point
in the guarded layer: read the gate, decide, clamp. A pass in which nothing triggers leaves every tensor untouched, so
its logits are bit-identical to the unguarded model's. Since the clamp acts behind what the gate reads, what the gate
sees never depends on whether it has clamped.

A rule that reaches back clamps a triggered sequence from its first token on. Where some of it was read before the
trigger, the sequence is read once more (rereading.py), so that what comes after a token is a function of the tokens up
to it: the same whether they came at once, in turns on a cache or one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from saeguard.errors import AttachError, NonFiniteError
from saeguard.guardrail import Guardrail
from saeguard.hookpoints import DESCRIPTIONS
from saeguard.hooks import around, at
from saeguard.model import decoder_layer, decoder_layers, entrances, input_device, port_at, run_to
from saeguard.normalise import Rereader
from saeguard.online.live import LiveRule, changes
from saeguard.online.memory import Memory
from saeguard.online.passes import READ_AGAIN, Again, Pass, only_the_last, reading_again
from saeguard.online.reach import Reach
from saeguard.online.rereading import Reading, check_rereadable, emptied, put_rows
from saeguard.online.sequences import Track
from saeguard.online.together import after_model, before_model, together
from saeguard.online.verdicts import Verdict as Verdict
from saeguard.online.verdicts import refused, verdicts
from saeguard.tokens import TokenMasks, attended_tokens, special_token_ids, token_masks, without_padding


class Guard:
    """A guardrail at work. `verdicts` has one entry for each sequence of the last forward pass."""

    def __init__(self, guardrail: Guardrail, model: nn.Module, tokenizer: Any, *, normalise: bool = False) -> None:
        self.guardrail = guardrail
        self._read_again = Rereader(tokenizer) if normalise else None
        self._model = model
        self._special_ids = special_token_ids(tokenizer)
        self._memory = Memory()
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None
        self._live = cache(self._rules_on)
        self._pass: Pass | None = None
        self._reach = Reach(guardrail.rules)
        self.clamping: Tensor | None = None
        """Which rules may clamp which rows (rows, rules) of the passes to come; None: all of them. Gates read on."""

    def _rules_on(self, device: torch.device) -> tuple[list[LiveRule], Tensor]:
        """The rules and the ids of special tokens, on the device on which the layer turns out to run."""
        return [LiveRule.of(rule, device) for rule in self.guardrail.rules], torch.tensor(
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
        return self._memory.last

    def track(self, kv: Cache, rows: int) -> Track:
        """What is known of the sequences in a cache of that many rows, all of whose tokens this guard has seen."""
        track = self._memory.recall(kv, rows)
        if track is None:
            raise AttachError("the cache is empty: nothing is known of its sequences")
        return track

    def judge(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Verdict]:
        """Verdicts on whole token sequences (batch, tokens), on any device, by a pass that stops at the guarded layer.

        Use it after beam search, where the rows of the last pass are beams and not the sequences returned. Without
        a mask, padding tokens at both ends are left out, unless they are also end-of-sequence tokens.
        """
        mask = without_padding(input_ids, self._pad) if attention_mask is None else attention_mask
        right = mask.argsort(dim=1, descending=True, stable=True)
        rows = [part.gather(1, right).to(input_device(self._model)) for part in (input_ids, mask)]
        self._memory.put_aside()
        with torch.inference_mode(), only_the_last():
            run_to(self._model, self.guardrail.layer, *rows)
        return self.verdicts

    @property
    def depth(self) -> tuple[int, int]:
        """How far back in the model it reads, to tell which of several guards comes first."""
        return self.guardrail.layer, list(DESCRIPTIONS).index(self.guardrail.hook)

    @property
    def in_a_pass(self) -> bool:
        """Whether a pass has begun and has not yet come to its end."""
        return self._pass is not None and self._pass.stage != "written"

    def settle(self, reading: Reading) -> Tensor | None:
        """Before a pass begins: read again what its cache holds otherwise than it is to be read now, and find which
        rules (rows, rules) have triggered on new sequences before they are read; None: none have."""
        ids, kv = reading.ids, reading.cache
        track = self._memory.recall(kv, len(ids))
        if track is not None and not self._memory.is_as_left(track, self._allowed()):
            for rows, wanted, _ in self._reach.readings(track, track.length, self._allowed(), whole=True):
                self._read_rows(reading, rows, wanted, () if kv is None else (kv,), whole=True)
        elif track is None and self._read_again is not None and READ_AGAIN.get() is None:
            return self._by_normalised(ids, attended_tokens(reading.inputs.get("attention_mask"), ids, _none_of(ids)))
        return None

    def begin(self, reading: Reading, presumed: Tensor | None) -> None:
        """A pass begins: note which tokens come, and what is known of their sequences."""
        ids, again, known = reading.ids, READ_AGAIN.get(), None
        track = self._memory.recall(reading.cache, len(ids))
        past = _none_of(ids) if track is None else track.attended.to(ids.device)
        attended = attended_tokens(reading.inputs.get("attention_mask"), ids, past).to(ids.device)
        if again is not None:
            known = again.wanted if again.reader is self else self._memory.of(again)
        if known is not None and self._read_again is not None:
            presumed = known.at_the_start
        self._pass = Pass(reading, ids, attended, track, presumed, again, known, outer=self._pass)

    def _by_normalised(self, ids: Tensor, attended: Tensor) -> Tensor | None:
        """Which rules (rows, rules) trigger on the normalised form of new sequences, read on its own; None: none do."""
        read = self._read_again
        again = None if read is None else read(ids, attended)
        if again is None:
            return None
        self._read_again, before = None, self._memory.put_aside()
        try:
            self.judge(again.ids, again.mask)
            if self.last is None:
                return None
            found = [[verdict.triggered for verdict in row] for row in self.all_verdicts]
        finally:
            self._read_again = read
            self._memory.take_up(before)
        return torch.tensor(found, device=ids.device) & again.changed[:, None]

    def end(self, module: nn.Module, output: Any) -> Any:
        """The end of a pass of `module`, which raised where there is no `output`: one that ended well has gone through
        the guarded layer. Where a trigger reaches back behind what was clamped, read again; the output with what then
        comes after the trigger."""
        now = self._pass
        if now is None or now.reading.module is not module or now.again is not READ_AGAIN.get():
            return output
        self._pass = now.outer
        if output is None:
            return None
        if now.stage != "written" or now.record is None:
            raise AttachError(f"the model ran without its layer {self.guardrail.layer}: nothing was guarded")
        if now.record is now.known:
            return output
        tokens, allowed = now.reading.tokens, self._allowed()
        for rows, wanted, where in self._reach.readings(now.record, tokens, allowed, whole=now.whole):
            other = self._read_rows(now.reading, rows, wanted, now.caches, whole=now.whole)
            output = now.reading.mixed(output, other, rows, where)
        self._memory.leave(now.record, allowed)
        return output

    def _allowed(self) -> Tensor | None:
        """`clamping` of the rows of this pass, which may be some of them, read again by another guard."""
        again = READ_AGAIN.get()
        return self.clamping if self.clamping is None or again is None else self.clamping[again.first_rows.cpu()]

    def _read_rows(self, reading: Reading, rows: Tensor, wanted: Track, caches: Sequence[Cache], *, whole: bool) -> Any:
        """Read some rows again, clamped as wanted, into the caches; the output."""
        fresh, within = emptied(caches[0]) if caches else None, READ_AGAIN.get()
        first_rows = rows if within is None else within.first_rows.to(rows.device)[rows]
        again = Again(self, wanted, rows, first_rows, len(reading.ids), caches[0] if caches else None, whole)
        with reading_again(again):
            other = reading.again(wanted, fresh)
        if fresh is not None:
            for kv in caches:
                put_rows(kv, rows, fresh)
        return other

    def before_layer(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook before the guarded layer: note the cache, which the model may only now have made."""
        if self._pass is None or self._pass.stage != "begun":
            raise AttachError(
                "the guarded layer ran without `input_ids`, or outside the model it is guarded in. Call the model "
                "itself, with `input_ids`: without them special tokens cannot be told apart."
            )
        caches = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
        for kv in caches if self._reach.any else ():
            check_rereadable(kv)
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
        if now.known is not None and now.again is not None and not now.again.behind:
            record, clamped = now.known, [rule.clamped for rule in now.known.rules]
            now.again.behind = now.again.reader is self
        else:
            new = self._read(now, hidden, activations, masks)
            record, clamped = now.with_new(new), [rule.clamped for rule in new.rules]
        self._memory.keep(record, now)
        change = changes(rules, activations, masks, clamped)
        self._pass = replace(now, stage="seen", record=record, change=change)
        return self.write(values) if self.guardrail.hook_out == self.guardrail.hook else None

    def _read(self, now: Pass, hidden: Tensor, activations: Sequence[Tensor], masks: TokenMasks) -> Track:
        """The record of the tokens of a pass: gate and decision of each rule, and what it is to clamp."""
        records = []
        for i, (rule, a) in enumerate(zip(self._live(hidden.device)[0], activations, strict=True)):
            record = rule.read(hidden, a, masks, None if now.track is None else now.track.rules[i])
            if now.presumed is not None:
                record = replace(record, triggered=record.triggered | now.presumed[:, i, None].to(hidden.device))
            if rule.rule.clamps:
                record = replace(record, clamped=self._to_clamp(now, i, record.triggered))
            records.append(record)
        active = torch.cat([a > 0 for a in activations], dim=-1) & masks.valid[..., None]
        return Track(now.ids, now.reading.positions.to(hidden.device), now.attended, active, tuple(records))

    def _to_clamp(self, now: Pass, i: int, triggered: Tensor) -> Tensor:
        """Which tokens (batch, tokens) of a pass rule `i` clamps if they are hot, from where it has triggered.

        All of a sequence that triggers where only what follows its last token is looked at; else those from the trigger
        on, as what comes out at those before it does not know of it.
        """
        if self.guardrail.rules[i].reaches_back and now.track is None and now.whole:
            triggered = triggered[:, -1:].expand_as(triggered)
        allowed = self._allowed()
        return triggered if allowed is None else triggered & allowed[:, i, None].to(triggered.device)

    def write(self, values: Tensor) -> Tensor | None:
        """At the hook point that is decoded: apply the clamp. None where nothing changes."""
        now = self._at_stage("seen")
        self._pass = replace(now, stage="written", change=None)
        if now.change is None:
            return None
        delta, where = (part.to(values.device) for part in now.change)
        hidden = values.view(*now.ids.shape, -1)
        return torch.where(where[..., None], (hidden + delta).to(hidden.dtype), hidden).view_as(values)

    def _at_stage(self, stage: str) -> Pass:
        if self._pass is None or self._pass.stage != stage:
            found = "no pass" if self._pass is None else self._pass.stage
            raise AttachError.mismatch(
                f"order in which the parts of layer {self.guardrail.layer} ran",
                found=found,
                expected=stage,
                fix=f"{self.guardrail.hook} cannot be guarded in this model.",
            )
        return self._pass


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
        guards = stack.enter_context(together(guard, decoder_layers(model)))
        for module in entrances(model):
            stack.enter_context(around(module, partial(before_model, guards), partial(after_model, guards)))
        stack.enter_context(around(decoder_layer(model, guardrail.layer), guard.before_layer))
        stack.enter_context(at(port_at(model, guardrail.point), guard.see))
        if guardrail.hook_out != guardrail.hook:
            stack.enter_context(at(port_at(model, replace(guardrail.point, hook=guardrail.hook_out)), guard.write))
        yield guard


def _none_of(ids: Tensor) -> Tensor:
    return ids.new_zeros(len(ids), 0, dtype=torch.bool)
