// Tiers and their members: a table while they are few, tiles when they are many. Who is lost comes first.
import { $, h, show } from "./dom.js";
import { ago, number, share } from "./format.js";

const MANY = 8;
const TITLES = { prefill: "Prefill", decode: "Decode", kv: "KV stores", gateway: "Gateways" };
const NAMES = { kv: "Store", gateway: "Gateway", prefill: "Worker", decode: "Worker" };
const BAD = ["lost", "silent", "stopped"];

const at = (row, name) => row[name] ?? 0;
const load = (row) => (at(row, "max_running") ? at(row, "running") / row.max_running : 0);

function bar(...parts) {
  return h("span", { class: "bar" }, parts.map(([part, kind]) => h("i", { class: part >= 0.9 && !kind ? "full" : kind, style: { width: `${Math.min(100, part * 100)}%` } })));
}
const barred = (part, text) => h("span", { class: "barred" }, bar([part]), text);

function state(row) {
  const since = row.quiet_s !== undefined ? ` for ${ago(row.quiet_s)}` : row.gone_s !== undefined ? `, was lost ${ago(row.gone_s)} ago` : "";
  return h("span", { class: "state" }, row.state, since);
}

function slots(row) {
  const counts = row.slots ?? {}, all = Object.values(counts).reduce((sum, value) => sum + value, 0);
  const held = all - at(counts, "free") - at(counts, "cached");
  return { all, held: all ? held / all : 0, cached: all ? at(counts, "cached") / all : 0 };
}

const NAME = ["", (row) => h("span", { class: "id" }, row.id)];
const STATE = ["State", state];
const COLUMNS = {
  worker: [
    NAME, STATE,
    ["Running", (row) => barred(load(row), `${at(row, "running")}/${at(row, "max_running")}`)],
    ["Waiting", (row) => number(at(row, "waiting")), "n"],
    ["KV use", (row) => barred(at(row, "kv"), share(at(row, "kv")))],
    ["Speed", (row) => speed(row), "n wide"],
  ],
  kv: [
    NAME, STATE,
    ["Held", (row) => share(slots(row).held), "n"],
    ["Cached", (row) => share(slots(row).cached), "n"],
    ["Slots", (row) => h("span", { class: "barred" }, bar([slots(row).held, "main"], [slots(row).cached, "second"]), number(slots(row).all))],
  ],
  gateway: [NAME, STATE, ["In flight", (row) => number(at(row, "running")), "n"], ["In line", (row) => number(at(row, "waiting")), "n"]],
};

const SLOW = 0.5;
const LASTING = 15; // frames: what workers measure of themselves varies
const slowFor = new Map(); // by id: in so many frames on end

/** Workers that compute prompts at less than half the speed of the others in their tier: [id, share of it]. */
function slowOnes(rows) {
  const found = new Map();
  for (const role of ["prefill", "decode"]) {
    const pool = rows.filter((row) => row.role === role && row.prefill_tokens_per_s && !BAD.includes(row.state));
    for (const row of pool) {
      const others = pool.filter((other) => other !== row).map((other) => other.prefill_tokens_per_s).sort((one, other) => one - other);
      const median = others[Math.floor(others.length / 2)];
      if (median && row.prefill_tokens_per_s < SLOW * median) found.set(row.id, row.prefill_tokens_per_s / median);
    }
  }
  for (const id of slowFor.keys()) if (!found.has(id)) slowFor.delete(id);
  for (const id of found.keys()) slowFor.set(id, (slowFor.get(id) ?? 0) + 1);
  return new Map([...found].filter(([id]) => slowFor.get(id) > LASTING));
}

function speed(row) {
  if (row.slow) return h("span", { class: "warn" }, `slow: ${number(row.prefill_tokens_per_s)} tok/s`);
  if (row.role === "prefill" && row.prefill_tokens_per_s) return `${number(row.prefill_tokens_per_s)} tok/s`;
  return row.step_ms ? `${number(row.step_ms)} ms/step` : "";
}

function table(role, rows) {
  const columns = COLUMNS[role] ?? COLUMNS.worker;
  return h("table", {},
    h("thead", {}, h("tr", {}, columns.map(([title, , kind]) => h("th", { scope: "col", class: kind }, title || NAMES[role])))),
    h("tbody", {}, rows.map((row) => h("tr", { class: `is-${row.state}`, "data-service": row.id }, columns.map(([, cell, kind]) => h("td", { class: kind }, cell(row)))))));
}

/** How many characters at the start all names have in common, up to a dash: tiles leave them out. */
function common(rows) {
  const [first, ...others] = rows.map((row) => row.id);
  let length = first.lastIndexOf("-") + 1;
  while (length > 0 && !others.every((id) => id.startsWith(first.slice(0, length)))) length = first.lastIndexOf("-", length - 2) + 1;
  return length;
}

function tile(row, skip) {
  const bad = row.state !== "ready" || row.slow;
  const part = row.role === "kv" ? slots(row).held : load(row);
  const text = bad ? (row.slow ? "slow" : row.state) : row.role === "kv" ? share(part) : row.role === "gateway" ? number(at(row, "running")) : `${at(row, "running")}/${at(row, "max_running")}`;
  const waits = at(row, "waiting") ? ` +${row.waiting}` : "";
  const title = `${row.id}: ${row.state}, running ${at(row, "running")} of ${at(row, "max_running")}, waiting ${at(row, "waiting")}, KV ${share(at(row, "kv"))}, ${row.node || "no node"}${row.slow ? ", slow" : ""}`;
  return h("li", { class: `is-${row.slow ? "draining" : row.state}`, title, "data-service": row.id },
    h("p", {}, h("span", { class: "id" }, row.id.slice(skip)), h("span", { class: row.state === "lost" ? "bad" : "" }, text + (bad ? "" : waits))),
    row.role !== "gateway" && bar([part]), ["prefill", "decode"].includes(row.role) && bar([at(row, "kv"), "second"]));
}

function summary(role, rows) {
  const count = (name) => rows.filter((row) => row.state === name).length;
  const parts = [`${count("ready")} ready`];
  for (const name of ["lost", "silent", "starting", "draining", "stopped"]) if (count(name)) parts.push(`${count(name)} ${name}`);
  const running = rows.filter((row) => !BAD.includes(row.state));
  const sum = (name) => running.reduce((total, row) => total + at(row, name), 0);
  if (role !== "kv") parts.push(`${number(sum("running"))}${sum("max_running") ? ` of ${number(sum("max_running"))}` : ""} running`, `${number(sum("waiting"))} waiting`);
  if (role === "prefill" && sum("queued_tokens")) parts.push(`${number(sum("queued_tokens"))} tokens to compute`);
  if (rows.length > MANY && role !== "kv" && role !== "gateway") parts.push("bars: running, KV use");
  return parts.join(" · ");
}

export function services(frame) {
  const slow = slowOnes(frame.services);
  const rows = frame.services.map((row) => (slow.has(row.id) ? { ...row, slow: true } : row));
  const groups = ["prefill", "decode", "kv", "gateway"].map((role) => {
    const members = rows.filter((row) => row.role === role);
    return [role, [...members.filter((row) => BAD.includes(row.state)), ...members.filter((row) => !BAD.includes(row.state))]];
  }).filter(([, members]) => members.length);
  show($("#services"), groups, () => groups.map(([role, members]) => h("section", { class: "group", "aria-label": TITLES[role] },
    h("h3", {}, TITLES[role], h("small", {}, summary(role, members))),
    members.length > MANY ? h("ul", { class: "tiles" }, members.map((row) => tile(row, common(members)))) : table(role, members))));
  const lost = rows.filter((row) => row.state === "lost").map((row) => row.id);
  const back = rows.filter((row) => row.gone_s !== undefined).sort((one, other) => one.gone_s - other.gone_s)[0];
  const health = $("#health");
  health.className = lost.length || !frame.bus ? "bad" : "warn";
  health.textContent = !frame.bus ? "the bus is away" : lost.length ? `lost: ${lost.slice(0, 4).join(", ")}${lost.length > 4 ? ` and ${lost.length - 4} more` : ""}` : back ? `${back.id} was lost ${ago(back.gone_s)} ago and began anew` : slow.size ? [...slow].map(([id, part]) => `${id} computes prompts at ${share(part)} of the speed of the others`).slice(0, 2).join("; ") : "";
}
