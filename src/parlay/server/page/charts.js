"use strict";
// Charts: a figure with a heading, a plot that the arrow keys read out, a legend and the values under the cursor.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 44, right: 10, top: 8, bottom: 22 };
const DASHES = { solid: "", dashed: "6 4", dotted: "2 3" };

function shape(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Round numbers from low to high, about so many. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((some) => some >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(at);
  return found;
}

/** How values of an axis become places; a logarithmic one counts octaves. */
function scaled(axis, from, to) {
  const put = axis.log ? Math.log2 : (value) => value;
  const low = put(axis.min), span = put(axis.max) - low || 1;
  return (value) => from + ((put(value) - low) / span) * (to - from);
}

class Chart {
  /** In a place of the page: what it is called and about, and how its axes' values are written. */
  constructor(place, { name, about, unit }) {
    this.name = name;
    this.unit = unit;
    this.at = null; // the x under the cursor; null for the last one
    const id = `chart-${place.childElementCount}`;
    this.plot = element("div", { class: "plot", tabindex: 0, role: "img", "aria-label": name });
    this.legend = element("ul", { class: "legend" });
    this.readout = element("p", { class: "readout", id });
    this.figure = element("figure", {},
      element("figcaption", {}, element("h2", {}, name), element("p", { class: "about" }, about)),
      this.plot, this.legend, this.readout);
    place.append(this.figure);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.move(null));
    this.plot.addEventListener("keydown", (event) => this.press(event));
    this.plot.addEventListener("blur", () => { this.readout.removeAttribute("aria-live"); this.move(null); });
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  /** What to show: axes, lines of [x, y or null] points, dots, stacked bands, the xs to read, and what to say of one. */
  show(spec) {
    this.spec = spec;
    this.figure.toggleAttribute("data-empty", !spec.xs.length);
    this.draw();
  }

  point(event) {
    if (!this.spec?.xs.length) return;
    const box = this.plot.getBoundingClientRect();
    const x = scaled(this.spec.x, MARGIN.left, box.width - MARGIN.right);
    const aim = event.clientX - box.left;
    this.move(this.spec.xs.reduce((best, some) => (Math.abs(x(some) - aim) < Math.abs(x(best) - aim) ? some : best)));
  }

  press(event) {
    const xs = this.spec?.xs ?? [];
    const now = this.at === null ? xs.length - 1 : xs.indexOf(this.at);
    const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: xs.length - 1 }[event.key];
    if (event.key === "Escape") return this.move(null);
    if (next === undefined || !xs.length) return;
    event.preventDefault();
    this.readout.setAttribute("aria-live", "polite");
    this.move(xs[Math.min(Math.max(next, 0), xs.length - 1)]);
  }

  move(at) {
    this.at = at;
    this.draw();
  }

  draw() {
    if (!this.spec) return;
    const { spec, plot } = this;
    const width = plot.clientWidth, height = plot.clientHeight;
    if (!width) return;
    if (this.at !== null && !spec.xs.includes(this.at)) this.at = null;
    const x = scaled(spec.x, MARGIN.left, width - MARGIN.right);
    const y = scaled(spec.y, height - MARGIN.bottom, MARGIN.top);
    const canvas = shape("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    canvas.append(...this.axes(x, y, width, height));
    for (const band of spec.bands ?? []) canvas.append(...this.band(band, x, y));
    for (const { points, color } of spec.dots ?? [])
      canvas.append(...points.map(([a, b]) => shape("circle", { cx: x(a), cy: y(b), r: 2.5, fill: color, opacity: 0.55 })));
    for (const line of spec.lines ?? []) canvas.append(...this.line(line, x, y));
    if (this.at !== null)
      canvas.append(shape("line", { class: "cursor", x1: x(this.at), x2: x(this.at), y1: MARGIN.top, y2: height - MARGIN.bottom }));
    plot.replaceChildren(canvas);
    this.explain();
  }

  axes(x, y, width, height) {
    const { spec } = this, drawn = [];
    for (const at of spec.y.ticks ?? ticks(spec.y.min, spec.y.max, 4)) {
      drawn.push(shape("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(at), y2: y(at) }));
      drawn.push(shape("text", { x: MARGIN.left - 6, y: y(at) + 4, "text-anchor": "end" }, spec.y.write(at)));
    }
    const marks = spec.x.ticks ?? ticks(spec.x.min, spec.x.max, 5);
    for (const at of marks)
      drawn.push(shape("text", { x: x(at), y: height - 6, "text-anchor": at === marks.at(-1) ? "end" : "middle" }, spec.x.write(at)));
    return drawn;
  }

  line({ points, color, dash }, x, y) {
    const paths = [[]];
    for (const [a, b] of points) b === null ? paths.push([]) : paths.at(-1).push(`${x(a).toFixed(1)},${y(b).toFixed(1)}`);
    return paths.filter((some) => some.length).map((some) => some.length > 1
      ? shape("polyline", { points: some.join(" "), fill: "none", stroke: color, "stroke-width": 2, "stroke-dasharray": DASHES[dash ?? "solid"], "stroke-linejoin": "round" })
      : shape("circle", { cx: some[0].split(",")[0], cy: some[0].split(",")[1], r: 2.5, fill: color }));
  }

  band({ points, color, opacity }, x, y) {
    const bars = [];
    const wide = points.length > 1 ? Math.abs(x(points[1][0]) - x(points[0][0])) + 0.4 : 3;
    for (const [at, low, high] of points)
      if (high > low) bars.push(shape("rect", { x: x(at) - wide / 2, y: y(high), width: wide, height: y(low) - y(high), fill: color, opacity }));
    return bars;
  }

  explain() {
    const { spec } = this;
    const keys = spec.legend ?? (spec.lines ?? []).map(({ name, color, dash }) => ({ name, color, dash }));
    this.legend.replaceChildren(...keys.map(({ name, color, dash, opacity }) => element("li", {},
      shape("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" },
        opacity === undefined
          ? shape("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: color, "stroke-width": 3, "stroke-dasharray": DASHES[dash ?? "solid"] })
          : shape("rect", { width: 22, height: 10, fill: color, opacity })),
      name)));
    const said = spec.xs.length ? spec.say(this.at ?? spec.xs.at(-1)) : "nothing yet";
    if (this.readout.textContent !== said) this.readout.textContent = said;
    this.plot.setAttribute("aria-label", `${this.name}: ${said}. Arrow keys read other places.`);
  }
}
