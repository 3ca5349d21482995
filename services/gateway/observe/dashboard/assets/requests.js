// The last and the slowest requests; one opens as a waterfall.
import { $, h } from "./dom.js";
import { clock, ms } from "./format.js";
import { get } from "./stream.js";
import { openTrace } from "./trace.js";

const LIMIT = 50;
const SEARCHED = 300; // of the last ones, for those that failed
const AGAIN_MS = 700;

export class Requests {
  constructor() {
    this.order = "last";
    this.seen = null;
    this.asking = false;
    this.rows = new Map(); // by trace: what is shown, and its row
    this.body = $("#requests tbody");
    for (const button of document.querySelectorAll("[data-order]")) button.addEventListener("click", () => this.choose(button));
  }

  choose(button) {
    this.order = button.dataset.order;
    for (const other of document.querySelectorAll("[data-order]")) other.setAttribute("aria-pressed", String(other === button));
    this.load();
  }

  /** `ended`: how many requests have ended; ask only when that has changed, or a trace is still to come. */
  now({ ended, traces }) {
    this.on = traces;
    if (!traces) $("#no-requests").textContent = "Traces are off: telemetry is switched off in this gateway's settings.";
    if (ended === this.seen || document.hidden) return;
    this.seen = ended;
    this.load();
    clearTimeout(this.later);
    this.later = setTimeout(() => this.load(), AGAIN_MS); // spans of other services come a moment later
  }

  async load() {
    if (this.asking) { this.again = true; return; }
    this.asking = true;
    try {
      const order = this.order, failed = order === "failed";
      const { traces } = await get(`/dashboard/traces?order=${failed ? "last" : order}&limit=${failed ? SEARCHED : LIMIT}`);
      if (order === this.order) this.show(failed ? traces.filter((trace) => trace.outcome !== "ok").slice(0, LIMIT) : traces);
    } catch {
      this.seen = null; // the stream says what is wrong; ask again with its next frame
    } finally {
      this.asking = false;
      if (this.again) { this.again = false; this.load(); }
    }
  }

  show(traces) {
    const none = $("#no-requests");
    none.hidden = traces.length > 0;
    if (this.on) none.textContent = this.order === "failed" ? "None of the last requests failed." : "No request has ended yet.";
    const rows = new Map(traces.map((trace) => {
      const text = JSON.stringify(trace), known = this.rows.get(trace.trace_id);
      return [trace.trace_id, known?.text === text ? known : { text, row: this.row(trace) }];
    }));
    this.rows = rows;
    const wanted = [...rows.values()].map(({ row }) => row);
    const focused = document.activeElement?.closest?.("#requests tr[data-trace]")?.dataset.trace;
    if (wanted.length !== this.body.children.length || wanted.some((row, at) => row !== this.body.children[at])) {
      this.body.replaceChildren(...wanted);
      if (focused && rows.has(focused)) rows.get(focused).row.focus({ preventScroll: true });
    }
  }

  key(event, open) {
    if (event.key !== "Enter") return;
    event.preventDefault(); // else the same key presses what the dialog puts the focus on
    open();
  }

  row(trace) {
    const open = () => openTrace(trace.trace_id);
    const id = trace.request_id ?? trace.trace_id;
    return h("tr", {
      tabindex: 0, "data-trace": trace.trace_id, "aria-label": `${trace.outcome} request ${id}, ${ms(trace.duration_ms)}: open its waterfall`,
      onclick: open, onkeydown: (event) => this.key(event, open),
    },
    h("td", {}, clock(trace.start_unix_ms)), h("td", { class: "mono clip", title: id }, id.slice(0, 12)),
    h("td", { class: "wide clip" }, trace.tenant ?? ""), h("td", { class: "wide" }, trace.path ?? ""),
    h("td", { class: { ok: "good", cancelled: "quiet", error: "bad" }[trace.outcome] ?? "warn" }, (trace.outcome ?? "").replaceAll("_", " ")),
    h("td", { class: "n" }, ms(trace.ttft_ms)), h("td", { class: "n" }, ms(trace.duration_ms)));
  }
}
