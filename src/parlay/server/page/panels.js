// What each chart shows of a snapshot.

const KNOWN = { off: "--off", eagle: "--c1", suffix: "--c2", prompt_lookup: "--c3", draft_model: "--c4", medusa: "--c5", self: "--c6" };
const SPARE = ["--c3", "--c4", "--c5", "--c6", "--c1", "--c2"];
const SPAN = 300; // seconds

function color(method) {
  KNOWN[method] ??= SPARE[Object.keys(KNOWN).length % SPARE.length];
  return `var(${KNOWN[method]})`;
}

const plainly = (value) => String(Number(value.toPrecision(3)));
const whole = (value) => String(Math.round(value));
const short = (value) => (value === null || value === undefined ? "–" : value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
const percent = (value) => `${Math.round(100 * value)}%`;
const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(100 * value).toFixed(Math.abs(value) < 0.0995 ? 1 : 0)}%`;
const ago = (seconds) => (seconds >= -1 ? "now" : `${-seconds} s ago`);

/** The axis of time: what is known of the last minutes, at least one of them. */
function pastOf(points) {
  const minutes = Math.min(Math.max(Math.ceil(points.length / 60), 1), SPAN / 60);
  const ticks = [...Array(minutes + 1).keys()].map((minute) => 60 * (minute - minutes));
  return { min: -60 * minutes, max: 0, ticks, write: (s) => (s ? `${s / 60} min` : "now") };
}

/** Axes and readings that charts over time share. points: one a second, the last one of all now. */
function overTime(points, lines, write, top) {
  const now = points.at(-1)?.at ?? 0;
  const drawn = lines.map((line) => ({ ...line, points: points.map((p) => [p.at - now, line.of(p)]) }));
  const highest = Math.max(0, ...drawn.flatMap((line) => line.points.map(([, y]) => y ?? 0)));
  const by = new Map(points.map((p) => [p.at - now, p]));
  return {
    x: pastOf(points),
    y: { min: 0, max: top ?? (highest * 1.1 || 1), write: write === short ? plainly : write },
    lines: drawn,
    xs: points.map((p) => p.at - now),
    say: (at) => `${ago(at)}: ` + lines.map((line) => `${line.name} ${line.of(by.get(at)) === null ? "–" : write(line.of(by.get(at)))}`).join(", "),
  };
}

/** Rows by method and depth: deeper bets are darker. */
function shares(points) {
  const now = points.at(-1)?.at ?? 0;
  const keys = [...new Set(points.flatMap((p) => Object.keys(p.shares)))].sort((a, b) => {
    const [m, d] = a.split(":"), [n, e] = b.split(":");
    return (m !== "off") - (n !== "off") || m.localeCompare(n) || d - e;
  });
  const parts = keys.map((key) => {
    const [method, depth] = key.split(":");
    return { key, method, depth: Number(depth ?? 0), opacity: depth ? Math.min(0.35 + 0.16 * (depth - 1), 1) : 0.45, color: color(method), points: [] };
  });
  for (const p of points) {
    const total = Object.values(p.shares).reduce((a, b) => a + b, 0);
    let low = 0;
    for (const part of parts) {
      const high = low + (total ? (p.shares[part.key] ?? 0) / total : 0);
      part.points.push([p.at - now, low, high]);
      low = high;
    }
  }
  const by = new Map(points.map((p) => [p.at - now, p.shares]));
  const say = (at) => {
    const counts = Object.entries(by.get(at)), total = counts.reduce((sum, [, n]) => sum + n, 0);
    const told = counts.sort((a, b) => b[1] - a[1]).map(([key, n]) => `${named(key)} ${percent(n / total)}`);
    return `${ago(at)}: ${told.slice(0, 5).join(", ") || "no row emitted"}`;
  };
  const methods = [...new Map(parts.map((part) => [part.method, part])).values()];
  return {
    x: pastOf(points),
    y: { min: 0, max: 1, ticks: [0, 0.25, 0.5, 0.75, 1], write: percent },
    bands: parts, xs: points.map((p) => p.at - now), say,
    legend: methods.map(({ method, color }) => ({ name: method === "off" ? "no bet" : method, color, opacity: method === "off" ? 0.45 : 1 })),
  };
}

function named(key) {
  const [method, depth] = key.split(":");
  return method === "off" ? "no bet" : `${method} ${depth} deep`;
}

/** Milliseconds of a pass by its new tokens: measured, by the stored profile, and as corrected since. */
function cost({ cost, passes }) {
  if (!cost || !passes.length) return { x: { min: 1, max: 64, log: true, ticks: [1, 4, 16, 64], write: whole }, y: { min: 0, max: 1, write: plainly }, xs: [], say: () => "" };
  const times = [...cost.live, ...cost.profiled, ...passes.map(([, ms]) => ms)];
  const low = Math.min(...times) / 1.1, top = Math.max(...times) * 1.1;
  const powers = [...Array(12).keys()].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** (power - 5)));
  const within = powers.filter((ms) => ms >= low && ms <= top);
  const last = cost.new.at(-1), marks = [];
  for (let at = 1; at <= last; at *= last > 256 ? 8 : 4) marks.push(at);
  return {
    x: { min: 1, max: Math.max(last, 2), log: true, ticks: marks, write: whole },
    y: { min: low, max: top, log: true, ticks: within.length > 6 ? within.filter((ms) => /^[0.]*1/.test(ms)) : within, write: plainly },
    dots: [{ points: passes.map(([n, ms]) => [Math.max(n, 1), ms]), color: "var(--off)" }],
    lines: [
      { name: "as corrected", color: "var(--c1)", points: cost.new.map((n, i) => [n, cost.live[i]]) },
      { name: "as calibrated", color: "var(--c2)", dash: "dashed", points: cost.new.map((n, i) => [n, cost.profiled[i]]) },
    ],
    legend: [
      { name: "as corrected", color: "var(--c1)" }, { name: "as calibrated", color: "var(--c2)", dash: "dashed" },
      { name: "measured", color: "var(--off)", dash: "dotted" },
    ],
    xs: cost.new,
    say: (n) => `${n} new tokens beside ${cost.rows} rows with ${cost.context} tokens in KV: ${short(cost.live[cost.new.indexOf(n)])} ms`,
  };
}

function acceptance({ acceptance }) {
  const methods = Object.entries(acceptance), levels = Math.max(1, ...methods.map(([, some]) => some.length));
  const xs = [...Array(methods.length ? levels : 0).keys()].map((level) => level + 1);
  return {
    x: { min: 1, max: Math.max(levels, 2), ticks: xs, write: whole }, y: { min: 0, max: 1, write: percent, ticks: [0, 0.25, 0.5, 0.75, 1] },
    lines: methods.map(([name, some]) => ({ name, color: color(name), points: some.map(({ accepted }, level) => [level + 1, accepted]) })),
    xs,
    say: (at) => `position ${at}: ` + methods.filter(([, some]) => some[at - 1]).map(([name, some]) => `${name} ${percent(some[at - 1].accepted)} of ${some[at - 1].tried}`).join(", "),
  };
}

function calibration({ calibration }) {
  const methods = Object.entries(calibration);
  const xs = [...new Set(methods.flatMap(([, some]) => some.bins.map((bin) => bin.predicted)))].sort((a, b) => a - b);
  return {
    x: { min: 0, max: 1, write: percent, ticks: [0, 0.25, 0.5, 0.75, 1] }, y: { min: 0, max: 1, write: percent, ticks: [0, 0.25, 0.5, 0.75, 1] },
    lines: [
      { name: "as predicted", color: "var(--rule)", dash: "dashed", points: [[0, 0], [1, 1]] },
      ...methods.map(([name, some]) => ({ name: `${name}, off by ${percent(some.error)}`, color: color(name), points: some.bins.map((bin) => [bin.predicted, bin.accepted]) })),
    ],
    xs,
    say: (at) => methods.flatMap(([name, some]) => some.bins.filter((bin) => bin.predicted === at).map((bin) => `${name}: ${percent(at)} predicted, ${percent(bin.accepted)} of ${bin.guesses} accepted`)).join(", "),
  };
}

/** Milliseconds per token of what was done lately beside what every fixed choice would have taken. */
function choices({ choices }) {
  if (!choices) return { x: { min: 0, max: 1, ticks: [], write: whole }, y: { min: 0, max: 1, write: plainly }, xs: [], say: () => "" };
  const others = Object.entries(choices.others), best = Math.min(...others.map(([, ms]) => ms));
  const bars = [["this policy", choices.ms_per_token], ...others];
  return {
    x: { min: -0.6, max: bars.length - 0.4, ticks: [], write: whole },
    y: { min: 0, max: Math.max(...bars.map(([, ms]) => ms)) * 1.05, write: plainly },
    bands: bars.map(([name, ms], place) => ({
      points: [[place, 0, ms], [place + 0.8, 0, 0]], opacity: place && ms !== best ? 0.5 : 1,
      color: place ? color(name.split(":")[0]) : "var(--ink)",
    })),
    legend: [["this policy", "var(--ink)"], ...[...new Set(others.map(([name]) => name.split(":")[0]))].map((name) => [name, color(name)])].map(([name, color]) => ({ name, color, opacity: 1 })),
    xs: [...bars.keys()],
    say: (at) => `${at ? `${bars[at][0]} would have taken` : "this policy took"} ${short(bars[at][1])} ms a token${bars[at][1] === best ? ", the best" : ""}`,
  };
}
