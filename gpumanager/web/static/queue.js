// Who runs and who waits: a picture of what comes when, and the list with its buttons.
import {byId, classes, keep, make, row, tell} from "/dashboard/dom.js";
import {badge, surface} from "/dashboard/marks.js";
import {about, count, lasting, shortened} from "/dashboard/words.js";

const LABELS = ["Place", "Consumer", "Kind", "Client", "For", "Turn in", "Do"];
/** The part of the picture before "now", for what runs already: not to scale. */
const PAST = 12;
/** How the broker calls all those that it does not tell apart, and how many requesters are shown. */
const OTHERS = "-", MOST_SHARES = 8;

/** The queue with a place on the time axis for each entry: it starts and ends at so many ms from
 *  now, unloading others and loading its consumer included. */
function planned(status) {
  return status.queue.map((entry) => {
    const start = entry.state === "running" ? 0 : entry.estimate_ms;
    return {entry, start, end: start + Math.max(1, entry.evict_ms + entry.load_ms + entry.run_ms)};
  });
}

/** In how long an entry's turn comes; where the job that runs is overdue, that is only a lower bound. */
function turn(entry) {
  if (!entry.overdue) return about(entry.estimate_ms);
  return entry.position === 1 ? "when it ends" : about(entry.estimate_ms).replace("≈", "≥");
}

function drawComing(places, names) {
  const strip = byId("coming");
  strip.hidden = places.length === 0;
  byId("coming-key").hidden = !places.some(({entry}) => entry.position && entry.evict_ms + entry.load_ms);
  const last = Math.max(1, ...places.map((place) => place.end));
  keep(strip, [...places, ...ticks(last, strip.clientWidth < 400 ? 2 : 4)], (it) => it.entry ? "t" + it.entry.ticket : "at" + it.at,
    (it) => {
      const span = make("span");
      if (it.entry) span.append(make("i", undefined, "before"), make("b"));
      return span;
    }, (span, it) => {
      const running = it.entry?.state === "running";
      const left = running ? 0 : PAST + (100 - PAST) * (it.entry ? it.start : it.at) / last;
      span.style.left = left + "%";
      if (!it.entry) {
        classes(span, left > 80 ? "tick end" : "tick");
        return tell(span, it.at === 0 ? "now" : "+" + lasting(it.at));
      }
      const width = (running ? PAST : 0) + (100 - PAST) * (it.end - it.start) / last;
      const i = names.indexOf(it.entry.consumer);
      classes(span, "block " + (i < 0 ? "rest" : surface(i)) + (running ? " runs" : ""));
      span.style.width = width + "%";
      const before = it.entry.evict_ms + it.entry.load_ms;
      span.firstChild.style.width = 100 * (running ? 0 : before / (it.end - it.start)) + "%";
      const marked = i >= 0 && width / 100 * strip.clientWidth > 32;
      if (span.lastChild.hidden !== !marked || span.lastChild.textContent !== String(i + 1)) {
        span.lastChild.replaceWith(i < 0 ? make("b") : badge(i));
        span.lastChild.hidden = !marked;
      }
      span.title = `${it.entry.consumer} ${it.entry.model ? it.entry.model + " " : ""}${it.entry.kind}: ${running ? "runs" : `turn ${turn(it.entry)}`}; `
        + [it.entry.evict_ms && `unload others ${lasting(it.entry.evict_ms)}`,
          it.entry.load_ms && `load ${lasting(it.entry.load_ms)}`,
          `run ${lasting(it.entry.run_ms)}${running ? " more" : ""}`].filter(Boolean).join(", ");
    });
  const waiting = places.filter((place) => place.entry.state !== "running");
  strip.setAttribute("aria-label", "What comes when, as estimated: " + (waiting.length === 0
    ? "nobody waits" : waiting.slice(0, 5).map((place) =>
      `${place.entry.consumer} ${about(place.start)}`).join(", ")
      + (waiting.length > 5 ? `, and ${waiting.length - 5} more` : "")));
}

/** Round moments on an axis of so many ms: two to four of them, as there is room. */
function ticks(last, room) {
  const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400];
  const step = 1000 * (steps.find((s) => last / (s * 1000) <= room) ?? steps.at(-1));
  const found = [];
  for (let at = 0; at <= last && found.length < 6; at += step) found.push({at});
  return found;
}

export function drawQueue(status, mayCancel) {
  const names = status.consumers.map((c) => c.name), places = planned(status);
  const usual = new Map(status.consumers.flatMap((c) => [[c.name, c.learned.run_ms],
    ...(c.models ?? []).map((model) => [`${c.name}/${model.name}`, model.learned.run_ms])]));
  const waiting = status.queue.filter((entry) => entry.state !== "running").length;
  const last = Math.max(0, ...places.map((place) => place.end));
  tell(byId("h-queue"), places.length === 0 ? "Queue"
    : `Queue: ${count(places.length - waiting, "runs", "run")}, ${count(waiting, "waits", "wait")}`
      + (last >= 1000 ? `; done in ${about(last)}` : ""));
  drawComing(places, names);
  keep(byId("queue-rows"), status.queue, (entry) => entry.ticket, (entry) => {
    const tr = row(LABELS), cells = tr.children;
    cells[1].append(make("span", undefined, "who"));
    const who = make("span");
    who.append(make("span", entry.consumer, "name"));
    if (entry.model) {
      who.append(make("span", shortened(entry.model, 48), "dim name which"));
      who.title = entry.model;
    }
    cells[1].firstChild.append(make("i"), who);
    const button = make("button", "Cancel");
    button.type = "button";
    button.dataset.ticket = entry.ticket;
    button.setAttribute("aria-label", "Cancel ticket " + entry.ticket);
    cells[6].append(button);
    return tr;
  }, (tr, entry) => {
    const running = entry.state === "running", cells = tr.children, i = names.indexOf(entry.consumer);
    const took = usual.get(`${entry.consumer}/${entry.model}`) ?? usual.get(entry.consumer);
    tell(cells[0], running ? "runs" : entry.position);
    if (i >= 0 && cells[1].firstChild.firstChild.textContent !== String(i + 1)) {
      cells[1].firstChild.firstChild.replaceWith(badge(i));
    }
    tell(cells[2], entry.kind + (entry.urgency === 3 ? "" : ` u=${entry.urgency}`));
    cells[2].title = `urgency ${entry.urgency}, of 0 (most urgent) to 7 (background)`
      + (entry.model ? `; model ${entry.model}` : "");
    tell(cells[3], entry.client || "–");
    tell(cells[4], lasting(entry.age_ms));
    tell(cells[5], !running ? turn(entry) : entry.overdue ? "overdue" : took ? "usually " + lasting(took.p50) : "–");
    classes(cells[5], running && entry.overdue ? "warn" : "");
    classes(tr, running ? "runs" : "");
    const button = cells[6].firstChild;
    button.dataset.running = running;
    button.dataset.words = `${entry.kind} of ${entry.consumer}${entry.model ? ` (${entry.model})` : ""}, which has run for ${lasting(entry.age_ms)}`;
    button.hidden = !mayCancel(entry);
  });
  byId("queue-box").hidden = places.length === 0;
  byId("nobody").hidden = places.length > 0;
  const s = status.scheduler, stats = s.total_jobs ? [["last wait", lasting(s.last_wait_ms)]] : [];
  if (s.total_jobs) stats.push(["longest overtake", overtake(s.longest_overtake)]);
  if (s.oldest_queued) {
    stats.push(["longest wait now", lasting(new Date(status.time) - new Date(s.oldest_queued))]);
  }
  keep(byId("stats"), stats, (each) => each[0], ([name]) => {
    const group = make("div");
    group.append(make("dt", name), make("dd"));
    return group;
  }, (group, [, value]) => tell(group.lastChild, value));
  drawShares(s.shares);
}

/** By how many jobs, and for how long, one was overtaken at most. */
function overtake({jobs, ms}) {
  if (!jobs) return "none";
  return count(jobs, "job", "jobs") + (ms ? ", " + lasting(ms) : "");
}

/** Who had the GPU for how long in the last hour: the first few, and all others together. */
function drawShares(shares) {
  const whole = shares.reduce((sum, each) => sum + each.gpu_ms, 0);
  const named = shares.filter((each) => each.requester !== OTHERS).slice(0, MOST_SHARES);
  const rest = shares.filter((each) => !named.includes(each));
  const rows = named.map((each) => ({...each, name: each.requester}));
  if (rest.length) {
    const sum = (field) => rest.reduce((all, each) => all + each[field], 0);
    rows.push({requester: OTHERS, name: "all others", gpu_ms: sum("gpu_ms"), jobs: sum("jobs")});
  }
  byId("shares-box").hidden = rows.length === 0;
  keep(byId("shares"), rows, (each) => each.requester, (each) => {
    const item = make("li");
    item.append(make("span", each.name, "name"), make("span", undefined, "meter"), make("span"));
    item.children[1].append(make("span"));
    return item;
  }, (item, each) => {
    const share = each.gpu_ms / Math.max(1, whole);
    item.children[1].firstChild.style.width = 100 * share + "%";
    tell(item.lastChild, `${Math.round(100 * share)} %: ${lasting(each.gpu_ms)}, ${count(each.jobs, "job", "jobs")}`);
  });
}
