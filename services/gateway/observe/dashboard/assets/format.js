// Numbers as people read them: three digits, a unit, a dash for nothing.

export const NOTHING = "–";
const none = (value) => value === null || value === undefined || Number.isNaN(value);

function digits(value) {
  const size = Math.abs(value);
  if (size === 0 || size >= 100) return Math.round(value).toString();
  return Number(value.toPrecision(size >= 10 ? 3 : 2)).toString();
}

export function number(value) {
  if (none(value)) return NOTHING;
  for (const [unit, of] of [["G", 1e9], ["M", 1e6], ["k", 1e4]]) {
    if (Math.abs(value) >= of) return digits(value / (unit === "k" ? 1e3 : of)) + unit;
  }
  return digits(value);
}

export function ms(value) {
  if (none(value)) return NOTHING;
  if (value < 1000) return `${digits(value)} ms`;
  return value < 1e5 ? `${Number((value / 1000).toPrecision(3))} s` : `${Math.round(value / 6e3) / 10} min`;
}

export function bytes(value) {
  if (none(value)) return NOTHING;
  for (const [unit, of] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= of) return `${digits(value / of)} ${unit}`;
  }
  return `${Math.round(value)} B`;
}

export function share(value) {
  if (none(value)) return NOTHING;
  const percent = value * 100;
  return `${percent > 99 && percent < 100 ? percent.toFixed(1) : Math.round(percent)} %`;
}

export function money(currency) {
  const shown = new Intl.NumberFormat([], { style: "currency", currency, maximumSignificantDigits: 3 });
  return (value) => (none(value) ? NOTHING : shown.format(value));
}

export function ago(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

export const clock = (unixMs) => new Date(unixMs).toLocaleTimeString([], { hour12: false });
