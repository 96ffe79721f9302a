// Memory, sensors and jobs over time, on one axis.
import {byId, draw, drawText, tell} from "/dashboard/dom.js";
import {fill, patterns} from "/dashboard/marks.js";
import {inWords} from "/dashboard/sentences.js";
import {clock, clockExact, count, lasting, mib} from "/dashboard/words.js";

/** Beyond these a picture gets slow, and its blocks are on top of each other anyway. */
const DRAWN = 2000;
/** The shortest time shown. */
const LEAST_S = 30;
const MEMORY = 120, STRIP = 40, LANE = 24, AXIS = 22, GAP = 10;
const STRIPS = [
  {field: "utilization_percent", name: "Load", unit: "%", most: () => 100},
  {field: "power_w", name: "Power", unit: "W", most: (gpu, top) => gpu.power_limit_w ?? top},
  {field: "temperature_c", name: "Temperature", unit: "°C", most: () => 100},
];

let shown = null;   // what was drawn last, for reading a moment
let cursor = null;  // the moment that is read, in ms; null: none

function frame(view) {
  const svg = byId("chart"), width = Math.max(280, byId("chart-box").clientWidth);
  const narrow = width < 640, left = narrow ? 0 : 170;
  const from = view.now - view.seconds * 1000, plot = width - left - 6;
  const x = (time) => left + plot * Math.min(1, Math.max(0, (time - from) / (view.now - from)));
  return {svg, width, narrow, left, right: left + plot, from, x, y: 0, parts: [], lane: narrow ? LANE + 16 : LANE};
}

/** A name beside its band, or above it where there is no room beside; no longer than fits. */
function label(f, text, y, note, indent = 0) {
  const fits = Math.floor((f.narrow ? f.width - 8 - indent : f.left - 12 - indent) / 6.4);
  const words = text.length > fits ? text.slice(0, Math.ceil(fits / 2) - 1) + "…" + text.slice(-Math.floor(fits / 2)) : text;
  const element = drawText({x: indent, y, class: "name"}, words);
  if (words !== text) element.append(Object.assign(draw("title", {}), {textContent: text}));
  f.parts.push(element);
  if (note) f.parts.push(drawText({x: 0, y: y + 14}, note));
}

/** Points of a curve in steps: memory is taken and given back at once. */
function steps(f, times, level, end) {
  const points = [];
  times.forEach((time, i) => {
    if (i) points.push(`${f.x(time).toFixed(1)},${level(i - 1).toFixed(1)}`);
    points.push(`${f.x(time).toFixed(1)},${level(i).toFixed(1)}`);
  });
  if (times.length) points.push(`${f.x(end).toFixed(1)},${level(times.length - 1).toFixed(1)}`);
  return points;
}

function memory(f, view) {
  const samples = view.samples, times = samples.map((s) => s.at);
  const total = Math.max(1, view.status.gpu.total_mib, ...samples.map((s) => s.total_mib));
  const top = f.y + (f.narrow ? 18 : 6), bottom = top + MEMORY;
  const y = (size) => bottom - MEMORY * Math.min(1, size / total);
  label(f, f.narrow ? `Memory, of ${mib(total)}` : "Memory", f.narrow ? top - 6 : top + 10, f.narrow ? "" : `of ${mib(total)}`);
  const below = samples.map(() => 0);
  const layer = (sizes, paint, name) => {
    if (!sizes.some((size) => size > 0)) return;
    const base = below.slice();
    const lower = steps(f, times, (i) => y(base[i]), view.now).reverse();
    sizes.forEach((size, i) => { below[i] += size; });
    const upper = steps(f, times, (i) => y(below[i]), view.now);
    f.parts.push(draw("polygon", {fill: paint, class: "area", points: [...upper, ...lower].join(" ")}, name));
  };
  view.status.consumers.forEach((c, i) => layer(samples.map((s) => s.held_mib[c.name] || 0), fill(i), c.name));
  layer(samples.map((s, i) => Math.max(0, s.used_mib - below[i])), "url(#p-foreign)", "foreign, the driver and others");
  for (const share of [0, 0.5, 1]) {
    const at = bottom - MEMORY * share;
    f.parts.push(draw("line", {class: "axis", x1: f.left, x2: f.right, y1: at, y2: at}));
    if (!f.narrow) {
      f.parts.push(drawText({x: f.left - 6, y: at + (share === 1 ? 9 : 3), "text-anchor": "end"},
        share ? mib(total * share) : "0"));
    }
  }
  const kept = view.status.gpu.reserved_mib;
  if (kept) {
    f.parts.push(draw("line", {class: "kept", x1: f.left, x2: f.right, y1: y(total - kept), y2: y(total - kept)},
      mib(kept) + " are reserved"));
  }
  f.y = bottom + GAP;
}

function strip(f, view, what) {
  const points = view.samples.filter((s) => s[what.field] !== undefined);
  if (!points.length) return;
  const figures = points.map((s) => s[what.field]);
  const most = Math.max(1, what.most(view.status.gpu, Math.max(...figures)));
  const top = f.y + (f.narrow ? 16 : 2), bottom = top + STRIP - 8, now = figures.at(-1);
  label(f, f.narrow ? `${what.name}: ${Math.round(now)} ${what.unit} now, at most ${Math.round(Math.max(...figures))}` : what.name,
    f.narrow ? top - 4 : top + 12, f.narrow ? "" : `${Math.round(now)} ${what.unit}, at most ${Math.round(Math.max(...figures))}`);
  const y = (figure) => bottom - (bottom - top) * Math.min(1, figure / most);
  const line = steps(f, points.map((s) => s.at), (i) => y(figures[i]), view.now);
  const foot = [`${f.x(view.now).toFixed(1)},${bottom}`, `${f.x(points[0].at).toFixed(1)},${bottom}`];
  f.parts.push(draw("polygon", {class: "sensed", points: [...line, ...foot].join(" ")}),
    draw("polyline", {class: "sensor", points: line.join(" ")}),
    draw("line", {class: "axis", x1: f.left, x2: f.right, y1: bottom, y2: bottom}));
  f.y = bottom + GAP;
}

const SHAPES = {
  down: (x, y) => `M${x - 5},${y - 8}h10l-5,8z`,
  up: (x, y) => `M${x - 5},${y}h10l-5,-8z`,
  cross: (x, y) => `M${x - 4},${y - 8}l4,4l4,-4l2,2l-4,4l4,4l-2,2l-4,-4l-4,4l-2,-2l4,-4l-4,-4z`,
};

function lanes(f, view) {
  const names = view.status.consumers.map((c) => c.name), tops = new Map();
  names.forEach((name, i) => {
    const bottom = f.y + f.lane;
    tops.set(name, bottom - LANE);
    const foot = f.narrow ? bottom - LANE - 3 : bottom - 7;
    f.parts.push(draw("rect", {class: "key", fill: fill(i), x: 0.5, y: foot - 9.5, width: 10, height: 10, rx: 2}));
    label(f, `${i + 1} ${name}`, foot, "", 16);
    f.parts.push(draw("line", {class: "axis", x1: f.left, x2: f.right, y1: bottom, y2: bottom}));
    f.y = bottom;
  });
  const index = new Map(names.map((name, i) => [name, i])), marks = [];
  const block = (name, from, until, className, words) => {
    const thin = className === "before";
    const attributes = {x: f.x(from).toFixed(1), y: tops.get(name) + (thin ? 8 : 4), height: thin ? 4 : 12,
      class: "job " + className, width: Math.max(2, f.x(until) - f.x(from)).toFixed(1)};
    if (className !== "failed") attributes.fill = fill(index.get(name));
    f.parts.push(draw("rect", attributes, words));
  };
  const wait = (name, from, until) => {
    if (until < f.from || f.x(until) - f.x(from) < 1) return;
    const y = tops.get(name) + 20;
    f.parts.push(draw("line", {class: "wait", x1: f.x(from), x2: f.x(until), y1: y, y2: y}));
  };
  const seen = view.events.filter((e) => e.at >= f.from && tops.has(e.consumer)).slice(-DRAWN);
  let jobs = 0;
  for (const e of seen) {
    const words = inWords(e);
    if (e.event === "job") {
      jobs++;
      const began = e.at - e.run_ms, granted = began - (e.prepare_ms ?? 0);
      if (e.wait_ms > 50) wait(e.consumer, granted - e.wait_ms, granted);
      if (f.x(began) - f.x(granted) >= 1) block(e.consumer, granted, began, "before", words.text);
      block(e.consumer, began, e.at, words.trouble ? "failed" : "", `${clockExact(e.at)} ${words.text}`);
    } else if (words.trouble || ["evicted", "loaded", "resumed"].includes(e.event)) {
      marks.push([e, words]);
    }
  }
  for (const entry of view.status.queue) {
    if (!tops.has(entry.consumer)) continue;
    const began = view.now - entry.age_ms;
    if (entry.state === "running") block(entry.consumer, began, view.now, "runs", `${entry.consumer} ${entry.kind} runs`);
    else wait(entry.consumer, began, view.now);
  }
  for (const [e, words] of marks) {
    const shape = e.event === "evicted" && !words.trouble ? "down" : words.trouble ? "cross" : "up";
    f.parts.push(draw("path", {class: "mark " + (words.trouble ? "trouble" : e.event === "evicted" ? "evicted" : "loaded"),
      d: SHAPES[shape](f.x(e.at), tops.get(e.consumer) + 14)}, `${clockExact(e.at)} ${words.text}`));
  }
  return jobs;
}

/** Round moments between two times, so many at most. */
function moments(from, until, most) {
  const found = [], step = [15, 30, 60, 120, 300, 600, 900, 1800].map((s) => s * 1000).find((s) => (until - from) / s <= most) ?? 3600000;
  for (let at = Math.ceil(from / step) * step; at <= until; at += step) found.push(at);
  return found;
}

/** Draw `view`: {status, events, samples, now, seconds}; times are ms on the broker's clock. */
export function drawChart(view) {
  // A broker that started a minute ago has nothing to show of the time before.
  const known = Math.min(view.samples[0]?.at ?? view.now, view.events[0]?.at ?? view.now);
  const seconds = Math.min(view.seconds, Math.max(LEAST_S, (view.now - known) / 1000));
  shown = {...view, seconds, samples: view.samples.filter((s) => s.at >= view.now - seconds * 1000)};
  const f = frame(shown);
  memory(f, shown);
  for (const what of STRIPS) strip(f, shown, what);
  const jobs = lanes(f, shown), grid = [];
  for (const at of moments(f.from, shown.now, f.narrow ? 4 : 7)) {
    grid.push(draw("line", {class: "grid", x1: f.x(at), x2: f.x(at), y1: f.narrow ? 18 : 6, y2: f.y}));
    const anchor = f.x(at) - f.left < 28 ? "start" : f.right - f.x(at) < 28 ? "end" : "middle";
    grid.push(drawText({x: f.x(at), y: f.y + 15, "text-anchor": anchor}, at % 60000 ? clockExact(at) : clock(at)));
  }
  const height = f.y + AXIS;
  f.svg.setAttribute("viewBox", `0 0 ${f.width} ${height}`);
  f.svg.setAttribute("height", height);
  f.svg.replaceChildren(patterns(shown.status.consumers.length), ...grid, ...f.parts,
    draw("line", {class: "cursor", id: "cursor", y1: 0, y2: f.y, x1: 0, x2: 0, visibility: "hidden"}));
  const most = Math.max(0, ...shown.samples.map((s) => s.used_mib));
  f.svg.setAttribute("aria-label", `The last ${lasting(shown.seconds * 1000)}: ${count(jobs, "job", "jobs")}; `
    + `at most ${mib(most)} of ${mib(shown.status.gpu.total_mib)} held`);
  read(f);
}

/** Say what there was at the moment under the cursor. */
function read(f) {
  const line = byId("cursor");
  if (cursor === null || !shown) {
    line?.setAttribute("visibility", "hidden");
    return tell(byId("readout"), "");
  }
  const from = shown.now - shown.seconds * 1000, at = Math.min(shown.now, Math.max(from, cursor));
  line.setAttribute("visibility", "visible");
  line.setAttribute("x1", f.x(at));
  line.setAttribute("x2", f.x(at));
  const sample = shown.samples.findLast((s) => s.at <= at);
  const held = Object.entries(sample?.held_mib ?? {}).filter(([, size]) => size > 0)
    .map(([name, size]) => `${name} ${mib(size)}`).join(", ");
  const sensed = STRIPS.filter((what) => sample?.[what.field] !== undefined)
    .map((what) => `${what.name.toLowerCase()} ${Math.round(sample[what.field])} ${what.unit}`).join(", ");
  const ran = shown.events.find((e) => e.event === "job" && e.at >= at && e.at - e.run_ms - (e.prepare_ms ?? 0) <= at)
    ?? shown.status.queue.find((e) => e.state === "running" && shown.now - e.age_ms <= at);
  tell(byId("readout"), [`${clockExact(at)}, ${lasting(shown.now - at)} ago`,
    sample && `${mib(sample.used_mib)} held${held ? ` (${held})` : ""}`, sensed,
    ran && `${ran.consumer} works (${ran.kind})`].filter(Boolean).join("; "));
}

export function watchCursor() {
  const box = byId("chart-box");
  const move = (at) => {
    cursor = at;
    if (shown) read(frame(shown));
  };
  box.addEventListener("pointermove", (event) => {
    if (!shown) return;
    const f = frame(shown), place = (event.clientX - f.svg.getBoundingClientRect().left - f.left) / (f.right - f.left);
    move(f.from + Math.min(1, Math.max(0, place)) * shown.seconds * 1000);
  });
  box.addEventListener("pointerleave", () => move(null));
  box.addEventListener("blur", () => move(null));
  box.addEventListener("keydown", (event) => {
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!way || !shown) return;
    event.preventDefault();
    const from = shown.now - shown.seconds * 1000;
    move(Math.min(shown.now, Math.max(from, (cursor ?? shown.now) + way * shown.seconds * 10)));
  });
}
