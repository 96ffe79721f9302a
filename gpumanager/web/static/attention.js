// What is wrong now, and what to do about it; and the events, in sentences.
import {byId, classes, keep, make, tell} from "/dashboard/dom.js";
import {stateOf} from "/dashboard/consumers.js";
import {inWords} from "/dashboard/sentences.js";
import {clockExact, count, lasting, mib} from "/dashboard/words.js";

const SHOWN = 60;
/** Foreign memory below this is a bare CUDA context, or a desktop. */
const FOREIGN_MIB = 600;

const REMEDIES = {
  down: "Start it; until its health call answers its jobs are refused.",
  failing: "Look at its own log. Jobs are refused in between; one at a time is tried.",
  "keeps its memory": "Restart it, or press Unload to try once more. A stronger eviction method belongs in its config: evict.",
  leaks: "Press Unload to get the memory back; if unloads do not give it back, restart it.",
  "partly on the CPU": "Raise its vram_resident_mib in the config, then press Unload.",
};

/** What is wrong, worst first: {key, tone, text, remedy}. */
export function troubles(status, now) {
  const found = [], gpu = status.gpu;
  for (const c of status.consumers) {
    const state = stateOf(c, now);
    if (state.tone !== "bad" && state.tone !== "warn") continue;
    found.push({key: c.name, tone: state.tone, remedy: REMEDIES[state.word] ?? "",
      text: `${c.name}: ${[state.word, state.when].filter(Boolean).join(" ")}${state.why ? ": " + state.why : ""}`});
  }
  // Where the card was never measured and the declared figures decide, somebody chose it so.
  const chosen = gpu.source === "ledger" && !gpu.last_sample;
  if (gpu.err && !chosen) found.push({key: "gpu", tone: "warn", text: `The card: ${gpu.err}`, remedy: "gpumanager doctor says why."});
  else if (gpu.source === "unknown") {
    found.push({key: "gpu", tone: "warn", text: "The card's size is not known, so nothing is decided by memory.",
      remedy: "Set gpu.total_mib in the config."});
  }
  for (const each of gpu.foreign ?? []) {
    if (each.mib < FOREIGN_MIB) continue;
    found.push({key: "pid" + each.pid, tone: "warn", remedy: "End it, or put it behind the broker as a consumer.",
      text: `${each.name || "A process"} (pid ${each.pid}) holds ${mib(each.mib)} and belongs to no consumer.`});
  }
  const usual = new Map(status.consumers.map((c) => [c.name, c.learned.run_ms]));
  for (const entry of status.queue) {
    const run = usual.get(entry.consumer);
    if (entry.state === "running" && entry.overdue) {
      found.push({key: "t" + entry.ticket, tone: "warn", remedy: "Cancel it in the queue, if it hangs.",
        text: `The running ${entry.kind} of ${entry.consumer} takes ${lasting(entry.age_ms)} so far; usual is ${run ? lasting(run.p50) : "less"}.`});
    }
  }
  return found.sort((a, b) => (a.tone === "bad" ? 0 : 1) - (b.tone === "bad" ? 0 : 1));
}

export function drawAttention(status, now) {
  const found = troubles(status, now);
  tell(byId("h-attention"), found.length === 0 ? "Nothing needs your attention"
    : count(found.length, "thing needs your attention", "things need your attention"));
  classes(byId("attention"), found.some((each) => each.tone === "bad") ? "bad-edge" : found.length ? "warn-edge" : "good-edge");
  byId("troubles").hidden = found.length === 0;
  keep(byId("troubles"), found, (each) => each.key, () => {
    const item = make("li");
    item.append(make("span", undefined, "what"), make("span", undefined, "remedy"));
    return item;
  }, (item, each) => {
    classes(item.firstChild, "what " + each.tone);
    tell(item.firstChild, each.text);
    tell(item.lastChild, each.remedy);
  });
  return found.length;
}

const WANTED = {
  all: () => true,
  moves: (e, words) => e.event !== "job" || words.trouble,
  trouble: (e, words) => words.trouble,
};

export function drawEvents(events) {
  const list = byId("events"), wanted = WANTED[byId("which").value], shown = [];
  for (let i = events.length - 1; i >= 0 && shown.length < SHOWN; i--) {
    const words = inWords(events[i]);
    if (wanted(events[i], words)) shown.push([events[i], words]);
  }
  list.hidden = shown.length === 0;
  byId("no-events").hidden = shown.length > 0;
  keep(list, shown, ([event]) => event.number, ([event, words]) => {
    const item = make("li"), text = make("span", undefined, "what");
    text.append(make("span", words.text, words.tone));
    if (words.remedy && words.trouble) text.append(" ", make("span", words.remedy, "remedy"));
    const glyph = make("span", words.glyph, "glyph " + words.tone);
    glyph.setAttribute("aria-hidden", "true");
    item.append(make("time", clockExact(event.time), "dim"), glyph, text);
    item.firstChild.dateTime = event.time;
    return item;
  }, () => {});
}
