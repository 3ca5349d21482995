// Draws the page's charts with uPlot from the JSON in #charts. Colours are the page's CSS variables, read again when the
// colour scheme changes and before printing.
"use strict";
(() => {
  const HEIGHT = 250;
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const plots = new Map(); // element -> uPlot
  let palette = {};

  const readPalette = () => {
    const style = getComputedStyle(document.documentElement);
    palette = new Proxy({}, { get: (_, name) => style.getPropertyValue(`--${name}`).trim() });
  };

  // Three significant digits; on an axis, and for counts, no zeros behind the point.
  const significant = (value, least = 0) => {
    if (value === 0) return "0";
    const digits = Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(Math.abs(value)))));
    const options = { minimumFractionDigits: Math.min(least, digits), maximumFractionDigits: digits };
    return value.toLocaleString("en", options).replaceAll(",", "\u202f");
  };
  const withUnit = (value, unit) => (value == null ? "–" : unit ? `${significant(value, 6)}\u00a0${unit}` : significant(value));
  const percentileText = (position) => {
    const percent = 100 * (1 - 10 ** -position);
    return percent.toFixed(Math.max(1, Math.ceil(position) - 1)).replace(/\.?0+$/, "");
  };

  const NINES = [0, 0.5, 0.75, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999].map((p) => -Math.log10(1 - p));
  const logSplits = (min, max) => {
    const every = [];
    for (let power = Math.floor(Math.log10(min)); power <= Math.ceil(Math.log10(max)); power++)
      for (const step of [1, 2, 5]) every.push(step * 10 ** power);
    const inside = (splits) => splits.filter((value) => value >= min * 0.999 && value <= max * 1.001);
    const chosen = inside(every);
    return chosen.length > 9 ? inside(every.filter((_, place) => place % 3 === 0)) : chosen;
  };

  // Stacked series are drawn as running sums; the values under the pointer stay the series' own.
  const drawn = (chart) => {
    if (!chart.stacked) return chart.columns;
    const sums = chart.columns[0].map(() => 0);
    return [chart.columns[0], ...chart.columns.slice(1).map((column) => column.map((value, i) => (sums[i] += value ?? 0)))];
  };

  const xScale = (chart) => ({
    time: false,
    distr: chart.x.scale === "log" ? 3 : 1,
    range: (_, min, max) => {
      if (min == null) return [0, 1];
      if (min < max) return [min, max];
      return chart.x.scale === "log" ? [min / 2, max * 2] : [min - 0.5, max + 0.5];
    },
  });

  const yScale = (chart, logarithmic) => ({
    distr: logarithmic ? 3 : 1,
    range: (_, min, max) => {
      const marks = chart.marks.filter((mark) => mark.axis === "y").map((mark) => mark.at);
      if (logarithmic) {
        const positive = chart.columns.slice(1).flat().filter((value) => value > 0);
        const low = positive.reduce((least, value) => Math.min(least, value), Infinity);
        const high = Math.max(max ?? 0, ...marks);
        return Number.isFinite(low) ? [low / 1.3, Math.max(high * 1.3, low * 2)] : [0.1, 1];
      }
      if (chart.y.unit === "%" && chart.y.label.startsWith("share")) return [0, 100];
      const top = Math.max(max ?? 0, ...marks);
      return [0, top > 0 ? top * 1.08 : 1];
    },
  });

  const axis = (label, options) => ({
    label,
    stroke: () => palette.soft,
    grid: { stroke: () => palette.grid, width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
    labelFont: "12px system-ui, sans-serif",
    labelSize: 20,
    ...options,
  });

  const xAxis = (chart) => {
    const options = { size: 28, space: 60, labelSize: 18 };
    if (chart.x.scale === "nines") {
      options.splits = (u) => NINES.filter((value) => value >= u.scales.x.min - 1e-9 && value <= u.scales.x.max + 1e-9);
      options.values = (_, splits) => splits.map(percentileText);
    } else if (chart.x.scale === "log") {
      options.splits = (_, __, min, max) => logSplits(min, max);
      options.values = (_, splits) => splits.map((value) => significant(value));
      options.filter = (_, splits) => splits;
    } else options.values = (_, splits) => splits.map((value) => significant(value));
    return axis(chart.x.label, options);
  };

  const yAxis = (chart, logarithmic) => {
    const options = { size: 56, values: (_, splits) => splits.map((value) => (value == null ? "" : significant(value))) };
    if (logarithmic) {
      options.splits = (_, __, min, max) => logSplits(min, max);
      options.filter = (_, splits) => splits;
    }
    // Requests, slots and leases are whole: no half of one on the axis.
    else if (!chart.y.unit) options.incrs = [1, 2, 5].flatMap((step) => [step, ...Array.from({ length: 9 }, (_, n) => step * 10 ** (n + 1))]).sort((a, b) => a - b);
    return axis(chart.y.label, options);
  };

  const marks = (chart) => (u) => {
    const { ctx, bbox } = u, ratio = uPlot.pxRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = palette["c-mark"];
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    ctx.lineWidth = 1.5 * ratio;
    ctx.setLineDash([5 * ratio, 4 * ratio]);
    for (const mark of chart.marks) {
      const scale = u.scales[mark.axis];
      if (mark.at < scale.min || mark.at > scale.max) continue;
      const at = u.valToPos(mark.at, mark.axis, true);
      ctx.beginPath();
      if (mark.axis === "x") {
        ctx.moveTo(at, bbox.top);
        ctx.lineTo(at, bbox.top + bbox.height);
        const right = at > bbox.left + bbox.width * 0.7;
        ctx.textAlign = right ? "right" : "left";
        ctx.fillText(mark.label, at + (right ? -6 : 6) * ratio, bbox.top + bbox.height - 8 * ratio);
      } else {
        ctx.moveTo(bbox.left, at);
        ctx.lineTo(bbox.left + bbox.width, at);
        ctx.textAlign = "right";
        ctx.fillText(mark.label, bbox.left + bbox.width - 4 * ratio, at + (at - bbox.top < 20 * ratio ? 14 : -7) * ratio);
      }
      ctx.stroke();
    }
    ctx.restore();
  };

  const tip = (chart) => {
    const box = document.createElement("div");
    let inside = false;
    box.className = "tip";
    box.hidden = true;
    const row = (label, value, colour) => {
      const line = document.createElement("div"), text = document.createElement("span"), strong = document.createElement("b");
      if (colour) {
        const swatch = document.createElement("i");
        swatch.style.setProperty("--c", `var(--c-${colour})`);
        line.append(swatch);
      }
      text.textContent = label;
      strong.textContent = value;
      line.append(text, strong);
      return line;
    };
    const show = (u) => {
      const place = u.cursor.idx;
      box.hidden = !inside || place == null;
      if (box.hidden) return;
      const x = chart.columns[0][place];
      const at = chart.x.scale === "nines" ? `${percentileText(x)}\u00a0%` : withUnit(x, chart.x.unit);
      box.replaceChildren(
        row(chart.x.label.replace(/ \([^)]*\)$/, ""), at),
        ...chart.series.map((line, i) => row(line.label, withUnit(chart.columns[i + 1][place], chart.y.unit), line.colour)),
      );
      const left = u.cursor.left > u.over.clientWidth / 2;
      box.style.left = left ? "" : `${u.cursor.left + 14}px`;
      box.style.right = left ? `${u.over.clientWidth - u.cursor.left + 14}px` : "";
    };
    return {
      init: (u) => {
        u.over.append(box);
        u.over.addEventListener("mouseenter", () => { inside = true; });
        u.over.addEventListener("mouseleave", () => { inside = false; box.hidden = true; });
      },
      setCursor: show,
    };
  };

  // A value without a neighbour has no line: it needs its dot.
  const dots = (chart, told, column) => {
    if (told.dots) return { show: true, size: 4, width: 0, fill: () => palette[`c-${told.colour}`] + "99" };
    if (chart.stacked || chart.x.scale === "log") return { show: false };
    return column.filter((value) => value != null).length < 3 ? { show: true, size: 6 } : { size: 5 };
  };

  const line = (chart, told, number) => ({
    label: told.label,
    stroke: () => palette[`c-${told.colour}`],
    width: chart.stacked ? 0.5 : 1.75,
    dash: told.dash.length ? told.dash : undefined,
    fill: told.fill ? () => palette[`c-${told.colour}`] + (chart.stacked ? "d9" : "24") : undefined,
    // A share within a bound rises at the values that were measured, not between them.
    paths: told.dots ? () => null : chart.x.scale === "log" && chart.y.scale !== "log" ? uPlot.paths.stepped({ align: 1 }) : undefined,
    points: dots(chart, told, chart.columns[number + 1]),
    scale: "y",
  });

  const build = (element, logarithmic) => {
    const chart = charts[element.dataset.chart];
    const before = plots.get(element);
    const { min, max } = before?.scales.x ?? {};
    before?.destroy();
    const pointer = tip(chart);
    const cursor = { y: false, points: { size: 6 }, drag: { x: true, y: false, dist: 6 } };
    if (chart.sync) cursor.sync = { key: chart.sync, setSeries: false };
    const plot = new uPlot(
      {
        width: element.clientWidth,
        height: HEIGHT,
        padding: [10, 12, 0, 0],
        legend: { show: false },
        cursor,
        scales: { x: xScale(chart), y: yScale(chart, logarithmic) },
        axes: [xAxis(chart), yAxis(chart, logarithmic)],
        series: [{}, ...chart.series.map((told, number) => line(chart, told, number))],
        bands: chart.stacked ? chart.series.slice(1).map((_, number) => ({ series: [number + 2, number + 1] })) : [],
        hooks: { init: [pointer.init], setCursor: [pointer.setCursor], draw: [marks(chart)] },
      },
      drawn(chart),
      element,
    );
    if (before) plot.setScale("x", { min, max });
    plots.set(element, plot);
  };

  // Latencies differ by powers of ten when something goes wrong: a logarithmic axis is one click away.
  const addScaleButton = (element) => {
    const chart = charts[element.dataset.chart];
    if (chart.stacked || chart.y.scale === "log" || !["s", "ms"].includes(chart.y.unit)) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "scale";
    button.textContent = "log";
    button.title = "Logarithmic vertical axis";
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(pressed));
      build(element, pressed);
    });
    element.closest("figure").querySelector("figcaption").prepend(button);
  };

  const redraw = () => {
    readPalette();
    for (const plot of plots.values()) plot.redraw(false, true);
  };
  const fit = () => {
    for (const [element, plot] of plots)
      if (element.clientWidth && element.clientWidth !== plot.width) plot.setSize({ width: element.clientWidth, height: HEIGHT });
  };

  readPalette();
  for (const element of document.querySelectorAll(".plot")) {
    addScaleButton(element);
    build(element, charts[element.dataset.chart].y.scale === "log");
  }
  new ResizeObserver(fit).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.theme = "light";
    for (const folded of document.querySelectorAll("details")) folded.open = true;
    fit();
    redraw();
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.theme;
    fit();
    redraw();
  });
})();
