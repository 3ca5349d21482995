// The headline figures and the charts.
import { $, h, show } from "./dom.js";
import { Chart } from "./charts.js";
import { bytes, money, ms, NOTHING, number, share } from "./format.js";

const PERCENTILES = [{ name: "p50", class: "c2" }, { name: "p95", class: "c1", dash: true }, { name: "p99", class: "c1" }];
const SPANS = [24, 60]; // slots: 2 and 5 minutes
const perSecond = (format) => (value) => (format(value) === NOTHING ? NOTHING : `${format(value)}/s`);

// key of the history, title, lines, format, options
const COURSES = [
  ["ttft_ms", "Time to first token (TTFT)", PERCENTILES, ms],
  ["itl_ms", "Between tokens (ITL)", PERCENTILES, ms],
  ["requests", "Requests", [{ name: "ok", class: "c1" }, { name: "shed", class: "c4" }, { name: "error", class: "c3" }], perSecond(number)],
  ["tokens", "Tokens", [{ name: "completion", class: "c1" }, { name: "prompt", class: "c2" }], perSecond(number)],
  ["shares", "Goodput and prefix hits", [{ name: "goodput", class: "c1" }, { name: "hits", class: "c2", dash: true }], share, { top: 1 }],
  ["load", "In flight and in line", [{ name: "active", class: "c1" }, { name: "queued", class: "c4" }], number],
  ["moved", "KV moved", [{ name: "local", class: "c1" }, { name: "peer", class: "c2" }], perSecond(bytes)],
];

export class Overview {
  constructor() {
    this.charts = COURSES.map(([, title, lines, format, options]) => new Chart(title, lines, format, options));
    this.reasons = h("div", { class: "chart" });
    $("#charts").append(...this.charts.map((chart) => chart.element), this.reasons);
    this.history = null;
  }

  now(frame) {
    const { rates, minute, quarter } = frame;
    const ended = (found) => Object.values(found.requests).reduce((sum, value) => sum + value, 0);
    const failed = (found) => (found.requests.shed ?? 0) + (found.requests.error ?? 0);
    const tiles = [
      ["Requests", perSecond(number)(rates.requests), `${number(ended(quarter))} in 15 min`],
      ["Tokens out", perSecond(number)(rates.completion_tokens), `${number(rates.prompt_tokens)}/s prompt`],
      ["TTFT p50", ms(minute.ttft_ms.p50), `p99 ${ms(minute.ttft_ms.p99)}`],
      ["ITL p50", ms(minute.itl_ms.p50), `p99 ${ms(minute.itl_ms.p99)}`],
      ["Within targets", share(minute.goodput), `${share(quarter.goodput)} in 15 min`],
      ["In flight", number(frame.active), `${number(frame.queued)} wait in line`],
      ["Prefix hits", share(minute.hits), `${share(quarter.hits)} in 15 min`],
      ["Shed and failed", number(failed(quarter)), `of ${number(ended(quarter))}, 15 min`],
    ];
    if (frame.price_per_hour) {
      const amount = money(frame.currency);
      tiles.push(["Cost", `${amount(frame.price_per_hour)}/h`, `${amount(quarter.cost?.per_million_tokens)}/M tokens`]);
    }
    show($("#headline"), tiles, () => tiles.map(([name, value, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, value), h("dd", {}, more))));
    this.showReasons(quarter);
    this.frame = frame;
  }

  past(history, frame) {
    const series = {
      ...history,
      shares: { goodput: history.goodput, hits: history.hits },
      load: { active: history.active, queued: history.queued },
    };
    const first = history.active.findIndex((value) => value !== null);
    const length = history.active.length, known = first < 0 ? 0 : length - first;
    // A gateway that has just begun has little to tell: show that little large.
    const shown = SPANS.find((slots) => slots >= known) ?? length;
    const target = frame?.targets.default;
    const targets = { ttft_ms: target && target.ttft_s * 1000, itl_ms: target && target.itl_s * 1000 };
    COURSES.forEach(([key, , lines], at) => {
      this.charts[at].update(lines.map((line) => series[key][line.name].slice(-shown)), history.slot_s, frame?.at_ms ?? Date.now(), targets[key] ?? null);
    });
  }

  showReasons(quarter) {
    const { shed, goodput_by_tier: tiers, retries, requests, tenants } = quarter;
    const list = (entries, format) => entries.map(([name, value]) => h("li", {}, h("span", {}, name.replaceAll("_", " ")), h("b", {}, format(value))));
    const sorted = (counts) => Object.entries(counts).filter(([, value]) => value > 0).sort((one, other) => other[1] - one[1]);
    const shown = { shed: sorted(shed), tiers: Object.entries(tiers), retries: sorted(retries), outcomes: sorted(requests), tenants: Object.entries(tenants) };
    show(this.reasons, shown, () => [
      h("h3", {}, "Why requests failed"),
      h("ul", { class: "bars" },
        shown.shed.length ? list(shown.shed, number) : h("li", { class: "quiet" }, "nothing was shed"),
        list(shown.outcomes.filter(([name]) => name !== "ok" && name !== "shed"), number),
        shown.retries.length > 0 && h("li", { class: "head" }, "Jobs given to another worker"),
        list(shown.retries, number),
        shown.tiers.length > 0 && h("li", { class: "head" }, "Within targets, by tier"),
        list(shown.tiers, share),
        shown.tenants.length > 1 && h("li", { class: "head" }, "Busiest tenants, of all tokens"),
        shown.tenants.length > 1 && list(shown.tenants, share)),
    ]);
  }
}
