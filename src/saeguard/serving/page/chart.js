"use strict";

// A rule's statistic after each token, as a line against its threshold. The point where it fired is marked.
const MARGIN = { left: 8, right: 8, top: 20, bottom: 18 };
const HEIGHT = 160;
const LEAST_TOKENS = 20;

function svg(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// `statistics` has a number or null for each token; `first` is the index of the token that fired, or -1.
function drawChart(box, { statistics, threshold, first, promptTokens, label }) {
  const width = Math.max(box.clientWidth, 240);
  const known = statistics.filter((value) => value !== null);
  const low = Math.min(0, threshold, ...known);
  const high = Math.max(threshold, ...known);
  const span = high - low || 1;
  const step = (width - MARGIN.left - MARGIN.right) / Math.max(statistics.length - 1, LEAST_TOKENS);
  const x = (token) => MARGIN.left + token * step;
  const y = (value) => HEIGHT - MARGIN.bottom - ((value - low) / span) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const points = statistics.map((value, i) => (value === null ? null : `${x(i).toFixed(1)},${y(value).toFixed(1)}`));
  const bottom = HEIGHT - MARGIN.bottom;
  const across = { x1: MARGIN.left, x2: width - MARGIN.right };
  const figure = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label });
  figure.append(svg("line", { class: "axis", ...across, y1: bottom, y2: bottom }));
  if (promptTokens > 0 && promptTokens < statistics.length) {
    const at = x(promptTokens - 0.5);
    figure.append(svg("line", { class: "split", x1: at, x2: at, y1: MARGIN.top, y2: bottom }));
    const anchor = at > width - 80 ? "end" : "start";
    figure.append(svg("text", { x: at, y: HEIGHT - 4, "text-anchor": anchor }, "answer"));
  }
  figure.append(svg("line", { class: "threshold", ...across, y1: y(threshold), y2: y(threshold) }));
  figure.append(svg("polyline", { class: "statistic", points: points.filter((point) => point).join(" ") }));
  if (first >= 0 && statistics[first] !== null) {
    figure.append(svg("circle", { class: "trigger", cx: x(first), cy: y(statistics[first]), r: 5.5 }));
  }
  const name = `threshold ${threshold.toPrecision(3)}`;
  figure.append(svg("text", { class: "bound", x: MARGIN.left, y: y(threshold) - 5 }, name));
  box.replaceChildren(figure);
}
