// Lines over the last quarter of an hour: axes with units, a gap where nothing was measured, values under the pointer.
import { h, s } from "./dom.js";
import { clock, NOTHING } from "./format.js";

const WIDTH = 300, HEIGHT = 112, LEFT = 44, BOTTOM = 16, TOP = 6;
const LOW = HEIGHT - BOTTOM;
const ALARMS = new Set(["c3", "c4"]); // drawn only where there is something to see

/** A round number at or above `value` whose half is round, too. */
function ceiling(value) {
  if (!(value > 0)) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 6, 8, 10].map((step) => step * size).find((step) => step >= value * 0.9999);
}

export class Chart {
  /** `lines`: [{name, class, dash}]; `top`: a fixed end of the scale. */
  constructor(title, lines, format, { top = null } = {}) {
    this.lines = lines;
    this.format = format;
    this.top = top;
    this.at = null;
    this.when = h("span", { class: "when" });
    this.legend = h("div", { class: "legend" });
    this.svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", tabindex: 0 });
    this.element = h("div", { class: "chart" }, h("h3", {}, title, this.when), this.legend, this.svg);
    this.title = title;
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    for (const end of ["pointerleave", "blur"]) this.svg.addEventListener(end, () => this.move(null));
    this.svg.addEventListener("keydown", (event) => this.step(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  update(series, slotS, atMs, target = null) {
    Object.assign(this, { series, slotS, atMs, target });
    this.draw();
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    this.move(Math.round(((event.clientX - box.left - LEFT) / (box.width - LEFT)) * (this.count - 1)));
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    this.move((this.at ?? this.count - 1) + by);
  }

  move(at) {
    this.at = at === null ? null : Math.max(0, Math.min(this.count - 1, at));
    this.draw();
  }

  get count() { return this.series ? this.series[0].length : 0; }

  draw() {
    if (!this.series) return;
    const width = Math.max(160, this.svg.clientWidth);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const highest = Math.max(0, ...this.series.flat().filter((value) => value !== null));
    const nearTarget = this.target !== null && highest > this.target / 3;
    const top = this.top ?? ceiling(Math.max(highest, nearTarget ? this.target : 0));
    const x = (at) => LEFT + (at / (this.count - 1)) * (width - LEFT);
    const y = (value) => LOW - (Math.min(value, top) / top) * (LOW - TOP);
    const parts = [0, 0.5, 1].flatMap((part) => [
      s("line", { class: "grid", x1: LEFT, x2: width, y1: y(part * top), y2: y(part * top) }),
      s("text", { x: LEFT - 6, y: y(part * top) + 4, "text-anchor": "end" }, this.format(part * top)),
    ]);
    const minutes = Math.round((this.count * this.slotS) / 60);
    for (const [part, anchor, text] of [[0, "start", `−${minutes} min`], [0.5, "middle", `−${minutes / 2}`], [1, "end", "now"]]) {
      parts.push(s("text", { x: x(part * (this.count - 1)), y: HEIGHT - 2, "text-anchor": anchor }, text));
    }
    if (nearTarget && this.target <= top) parts.push(s("line", { class: "target", x1: LEFT, x2: width, y1: y(this.target), y2: y(this.target) }));
    const drawn = this.lines.map((line, at) => [line, at]).filter(([line, at]) => !ALARMS.has(line.class) || this.series[at].some((value) => value > 0));
    drawn.reverse().forEach(([line, at]) => parts.push(s("path", { class: `${line.class}${line.dash ? " dash" : ""}`, d: path(this.series[at], x, y) })));
    if (this.at !== null) parts.push(s("line", { class: "cursor", x1: x(this.at), x2: x(this.at), y1: TOP, y2: LOW }));
    this.svg.replaceChildren(...parts);
    this.tell(nearTarget);
  }

  tell(nearTarget) {
    const at = this.at ?? this.count - 1;
    const said = this.lines.map((line, number) => [line, this.format(this.series[number][at])]);
    this.when.textContent = this.at === null ? "" : clock(this.atMs - (this.count - 1 - at) * this.slotS * 1000);
    this.legend.replaceChildren(
      ...said.map(([line, value]) => h("span", { class: line.dash ? "dash" : "" }, h("i", { class: line.class }), `${line.name} `, h("b", {}, value))),
      ...(nearTarget ? [h("span", { class: "dash" }, h("i", { class: "c4" }), `target ${this.format(this.target)}`)] : []),
    );
    const spoken = said.map(([line, value]) => `${line.name} ${value === NOTHING ? "nothing" : value}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}, ${this.when.textContent || "newest"}: ${spoken}. Arrow keys move through time.`);
  }
}

function path(values, x, y) {
  let drawn = "", open = false;
  values.forEach((value, at) => {
    if (value === null) { open = false; return; }
    const point = `${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    drawn += open ? `L${point}` : `M${point}h0`;
    open = true;
  });
  return drawn;
}
