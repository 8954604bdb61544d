"use strict";

const FEATURES_SHOWN = 6;
const $ = (id) => document.getElementById(id);
const page = { info: null, sides: [], abort: null };

function make(name, text, ...classes) {
  const node = document.createElement(name);
  node.textContent = text;
  node.classList.add(...classes);
  return node;
}

// One of the two answers: its conversation, and what the gates read in it.
class Side {
  constructor({ guarded }) {
    this.guarded = guarded;
    this.messages = [];
    this.box = $("side").content.cloneNode(true).firstElementChild;
    this.box.dataset.side = guarded ? "guarded" : "unguarded";
    this.part("h2").textContent = guarded ? "Guarded" : "Without guardrails";
    this.charts = page.info.data.map((rule) => {
      const heading = make("h3", `${rule.rule}: gate statistic, token by token`);
      const figure = make("div", "");
      if (page.info.playground) this.part(".charts").append(heading, figure);
      return figure;
    });
    $("sides").append(this.box);
    this.clear();
  }

  part(selector) {
    return this.box.querySelector(selector);
  }

  clear() {
    Object.assign(this, { tokens: [], promptTokens: 0, text: "", traced: "", verdicts: [], pending: false });
    for (const name of [".prompt", ".answer", ".features", ".verdict"]) this.part(name).replaceChildren();
    this.unread = make("span", "", "unread");
    this.part(".answer").append(this.unread);
    this.draw();
  }

  async ask(content, signal) {
    this.messages.push({ role: "user", content });
    this.clear();
    const body = {
      model: page.info.model, messages: this.messages, stream: true, temperature: 0,
      max_tokens: Math.min(Number($("length").value) || 80, page.info.max_tokens),
    };
    if (page.info.playground) body.saeguard = { trace: true, guardrails: this.guarded ? null : [] };
    try {
      for await (const chunk of stream("v1/chat/completions", body, signal)) this.take(chunk);
    } finally {
      // A turn that brought no answer is not part of the conversation.
      if (this.text) this.messages.push({ role: "assistant", content: this.text });
      else this.messages.pop();
      this.draw();
    }
  }

  take(chunk) {
    for (const { tokens } of chunk.saeguard_trace ?? []) tokens.forEach((token) => this.read(token));
    if (chunk.saeguard_trace && !this.promptTokens) this.promptTokens = this.tokens.length;
    for (const { delta } of chunk.choices) this.text += delta.content ?? "";
    this.verdicts = chunk.saeguard ?? this.verdicts;
    this.unread.textContent = this.text.slice(this.traced.length);
    this.unread.classList.toggle("unread", page.info.playground);
    if (!this.pending) {
      this.pending = true;
      requestAnimationFrame(() => this.draw());
    }
  }

  read(token) {
    const index = this.tokens.push(token) - 1;
    const span = make("span", token.text, "token");
    span.classList.toggle("special", token.special);
    span.classList.toggle("hot", token.readings.some((reading) => reading.hot));
    const clamped = token.readings.some((reading, rule) => {
      return reading.hot && reading.triggered && page.info.data[rule].action !== "monitor";
    });
    span.classList.toggle("clamped", this.guarded && clamped);
    span.classList.toggle("fires", token.readings.some((_, rule) => this.first(rule) === index));
    span.title = token.readings.map(describe).join("\n");
    if (this.promptTokens) {
      this.traced += token.special ? "" : token.text;
      this.unread.before(span);
    } else {
      this.part(".prompt").append(span);
    }
  }

  first(rule) {
    return this.tokens.findIndex((token) => token.readings[rule].triggered);
  }

  draw() {
    this.pending = false;
    const lines = page.info.playground ? page.info.data.map((_, i) => this.line(i)) : this.verdicts.map(told);
    this.part(".verdict").textContent = lines.join(" · ");
    const fired = this.verdicts.some((verdict) => verdict.triggered) || page.info.data.some((_, i) => this.first(i) >= 0);
    this.part(".verdict").classList.toggle("fired", fired);
    if (!page.info.playground) return;
    page.info.data.forEach((rule, i) => drawChart(this.charts[i], {
      statistics: this.tokens.map((token) => token.readings[i].statistic),
      threshold: rule.threshold, first: this.first(i), promptTokens: this.promptTokens, label: this.line(i),
    }));
    this.drawFeatures();
  }

  line(i) {
    if (!this.tokens.length) return "";
    const { rule, threshold } = page.info.data[i];
    const first = this.first(i);
    if (first >= 0) {
      const where = `${first < this.promptTokens || !this.promptTokens ? "the prompt" : "the answer"}`;
      return `${rule} fired in ${where}, at token ${first} “${this.tokens[first].text.trim()}”`;
    }
    const most = Math.max(0, ...this.tokens.map((token) => token.readings[i].statistic ?? 0));
    return `${rule} did not fire: at most ${most.toPrecision(3)} of ${threshold.toPrecision(3)}`;
  }

  drawFeatures() {
    const rows = page.info.data.flatMap((rule, i) => rule.features.map((feature) => {
      const on = this.tokens.filter((token) => token.readings[i].features.includes(feature.id));
      return { feature, count: on.length, here: [...new Set(on.map((token) => token.text.trim()))].filter(Boolean) };
    }));
    const active = rows.filter((row) => row.count).sort((a, b) => b.count - a.count);
    if (!active.length) return this.part(".features").replaceChildren();
    const table = make("table", "");
    const cells = (tag, texts) => table.insertRow().append(...texts.map((text) => make(tag, text)));
    cells("th", ["Feature", "Tokens", "Active here on", "What it means"]);
    for (const { feature, count, here } of active.slice(0, FEATURES_SHOWN)) {
      cells("td", [feature.id, count, here.slice(0, 6).join(", "), meaning(feature)]);
    }
    if (active.length > FEATURES_SHOWN) cells("td", ["", "", `and ${active.length - FEATURES_SHOWN} more`, ""]);
    this.part(".features").replaceChildren(table);
  }
}

function meaning(feature) {
  const strongest = feature.tokens.length ? `strongest on ${feature.tokens.join(", ")}` : "";
  return [feature.explanation, strongest].filter(Boolean).join("; ") || "not explained";
}

function describe(reading) {
  const value = reading.statistic === null ? "nothing read yet" : `statistic ${reading.statistic.toPrecision(3)}`;
  const features = reading.features.length ? `, features ${reading.features.join(", ")}` : "";
  return `${reading.rule}: ${value}${features}`;
}

function told(verdict) {
  const { rule, triggered, first_token: first, statistic, threshold } = verdict;
  const figures = `${statistic === null ? "nothing read" : statistic.toPrecision(3)} of ${threshold.toPrecision(3)}`;
  return triggered ? `${rule} fired at token ${first} (${figures})` : `${rule} did not fire (${figures})`;
}

async function call(path, options = {}) {
  const key = $("key").value;
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  if (response.status === 401) $("keyline").hidden = false;
  const { error } = await response.json();
  throw new Error(error.message);
}

// The objects of a stream of server-sent events.
async function* stream(path, body, signal) {
  const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (rest + part.value).split("\n\n");
    rest = blocks.pop();
    for (const data of blocks.map((block) => block.slice("data: ".length)).filter((data) => data !== "[DONE]")) {
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function open() {
  page.info = await (await call("v1/guardrails")).json();
  const names = page.info.data.map((rule) => `${rule.id} (${rule.action})`).join(", ");
  $("about").textContent = [page.info.model, names && `guardrails: ${names}`].filter(Boolean).join(" · ");
  $("legend").hidden = !page.info.playground;
  $("sides").replaceChildren();
  page.sides = [];
  if (page.info.playground || !page.info.guarded) page.sides.push(new Side({ guarded: false }));
  if (page.info.guarded) page.sides.push(new Side({ guarded: true }));
  if (!page.info.playground) $("about").textContent += " · start the server with --playground to see inside";
}

async function attempt(work) {
  $("notice").textContent = "";
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") $("notice").textContent = error.message;
  }
}

async function ask() {
  const content = $("prompt").value.trim();
  if (!content || page.abort) return;
  page.abort = new AbortController();
  $("send").disabled = $("reset").disabled = true;
  $("stop").disabled = false;
  await attempt(async () => {
    if (!page.info) await open();
    $("prompt").value = "";
    const done = await Promise.allSettled(page.sides.map((side) => side.ask(content, page.abort.signal)));
    for (const { reason } of done) if (reason) throw reason;
  });
  page.abort = null;
  $("send").disabled = $("reset").disabled = false;
  $("stop").disabled = true;
  $("prompt").focus();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => page.abort?.abort());
$("reset").addEventListener("click", () => attempt(open));
$("key").addEventListener("change", () => { if (!page.info) attempt(open); });
window.addEventListener("resize", () => page.sides.forEach((side) => side.draw()));
attempt(open);
