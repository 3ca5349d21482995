// One request's waterfall: every span a line, its attributes on a click or Enter.
import { $, h } from "./dom.js";
import { ms } from "./format.js";
import { get } from "./stream.js";

const dialog = $("#trace");
const body = $("#trace-body");
$("#trace-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

export async function openTrace(id) {
  $("#trace-title").textContent = "Request";
  body.replaceChildren(h("p", { class: "quiet" }, "loading"));
  if (!dialog.open) dialog.showModal();
  try {
    const trace = await get(`/dashboard/traces/${encodeURIComponent(id)}`);
    $("#trace-title").textContent = `Request ${trace.request_id ?? trace.trace_id}`;
    draw(trace, false);
  } catch (error) {
    body.replaceChildren(h("p", { class: "bad" }, error.message));
  }
}

function draw(trace, zoomed) {
  const first = trace.receipt?.actual_ttft_ms;
  const choose = (text, zoom) => h("button", { type: "button", "aria-pressed": String(zoom === zoomed), onclick: () => { draw(trace, zoom); $(`#trace-body [aria-pressed="true"]`).focus(); } }, text);
  body.replaceChildren(facts(trace), first ? h("div", { class: "choice", role: "group", "aria-label": "Time shown" }, choose("Whole request", false), choose("Until the first token", true)) : "",
    waterfall(trace.spans, zoomed ? first : null));
}

function facts(trace) {
  const receipt = trace.receipt ?? {};
  const stages = Object.entries(receipt.stages_ms ?? {}).map(([name, spent]) => `${name} ${ms(spent)}`).join(", ");
  const way = [receipt.prefill, receipt.decode].filter(Boolean).join(" → ");
  const found = [
    ["Outcome", trace.outcome], ["Path", receipt.path && `${receipt.path}${receipt.reason && receipt.reason !== receipt.path ? `, ${receipt.reason}` : ""}`], ["Workers", way],
    ["First token", receipt.actual_ttft_ms && ms(receipt.actual_ttft_ms)], ["Promised", receipt.predicted_ttft_ms && ms(receipt.predicted_ttft_ms)],
    ["Cached tokens", receipt.cached_tokens], ["Retries", receipt.retries || null], ["Stages", stages],
    ["Trace", trace.trace_id],
  ];
  return h("dl", { class: "facts" }, found.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { class: name === "Trace" ? "mono" : "" }, String(value)))));
}

/** Parents before children, each with how deep it is. A span whose parent is not here stands by itself. */
export function ordered(spans) {
  const ids = new Set(spans.map((span) => span.span_id));
  const under = new Map();
  for (const span of [...spans].sort((one, other) => one.start_ms - other.start_ms)) {
    const parent = ids.has(span.parent_id) ? span.parent_id : "";
    under.set(parent, [...(under.get(parent) ?? []), span]);
  }
  const found = [];
  const walk = (id, depth) => (under.get(id) ?? []).forEach((span) => { found.push([span, depth]); walk(span.span_id, depth + 1); });
  walk("", 0);
  return found;
}

/** `until`: ms at which the picture ends; null: with the last span. */
function waterfall(spans, until) {
  const begins = Math.min(0, ...spans.map((span) => span.start_ms));
  const whole = (until ?? Math.max(0.001, ...spans.map((span) => span.start_ms + span.duration_ms))) - begins;
  const part = (at) => Math.max(0, Math.min(1, (at - begins) / whole)) * 100;
  const axis = h("div", { class: "axis", "aria-hidden": "true" }, [0, 0.25, 0.5, 0.75, 1].map((at) => h("span", {}, ms(begins + at * whole))));
  return h("div", { class: "fall" }, axis, ordered(spans).flatMap(([span, depth]) => {
    const bad = span.status === "error";
    const more = details(span);
    const line = h("button", { type: "button", class: "span", "aria-expanded": "false", onclick: () => {
      more.hidden = !more.hidden;
      line.setAttribute("aria-expanded", String(!more.hidden));
    } },
    h("span", { class: `name${bad ? " bad" : ""}`, style: { paddingLeft: `${depth * 14}px` } }, span.name, h("small", {}, span.instance || span.service)),
    h("span", { class: "lane" },
      h("i", { class: bad ? "bad" : "", style: { left: `min(${part(span.start_ms)}%, calc(100% - 2px))`, width: `${part(span.start_ms + span.duration_ms) - part(span.start_ms)}%` } }),
      (span.events ?? []).filter((event) => event.at_ms <= begins + whole).map((event) => h("u", { title: `${event.name} at ${ms(event.at_ms)}`, style: { left: `min(${part(event.at_ms)}%, calc(100% - 2px))` } }))),
    h("span", { class: "n" }, ms(span.duration_ms)));
    return [line, more];
  }));
}

function details(span) {
  const lines = [["starts at", ms(span.start_ms)], ...(span.error ? [["error", span.error]] : []), ...Object.entries(span.attributes ?? {}),
    ...(span.events ?? []).map((event) => [`${event.name} at ${ms(event.at_ms)}`, Object.entries(event.attributes ?? {}).map(([name, value]) => `${name} ${value}`).join(", ")])];
  return h("dl", { class: "more", hidden: true }, lines.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]));
}

