// The consumers: what each one is up to, what it holds, and what may be done with it.
import {byId, classes, keep, make, row, tell} from "/dashboard/dom.js";
import {badge, surface} from "/dashboard/marks.js";
import * as models from "/dashboard/models.js";
import {ago, lasting, mib, since} from "/dashboard/words.js";

const LABELS = ["Consumer", "State", "Memory", "Jobs", "Usual run", "Last used", "Do"];

/** A consumer's state: a word, how bad it is, since when, and why. */
export function stateOf(c, now) {
  const from = (time) => time ? since(time, now) : "";
  if (c.stopped_by) {
    return {word: "stopped", tone: "dim", when: from(c.health_since),
      why: "by the broker, to take its memory back; its next job starts it"};
  }
  if (c.quarantine) return {word: "keeps its memory", tone: "warn", when: "", why: c.quarantine};
  if (c.breaker !== "closed") {
    return {word: "failing", tone: "bad", when: from(c.breaker_since), why: c.last_error ?? ""};
  }
  if (c.probed && !c.healthy) {
    return {word: "down", tone: "bad", when: from(c.health_since), why: c.last_error ?? ""};
  }
  if (c.on_cpu) {
    return {word: "partly on the CPU", tone: "warn", when: "", why: c.on_cpu.join(", ")};
  }
  if (c.growth?.verdict === "leaks") {
    const g = c.growth, more = g.over === "loads" ? `${mib(g.mib_per_load)} with each load`
      : `${mib(g.mib_per_job)} with each job, ${mib(g.grown_mib)} so far`;
    return {word: "leaks", tone: "warn", when: from(g.since), why: more};
  }
  if (!c.probed) return {word: "not asked yet", tone: "dim", when: "", why: ""};
  return {word: "healthy", tone: "good", when: "", why: ""};
}

function actions(c) {
  const cell = make("span", undefined, "buttons");
  for (const [what, word] of [["load", "Load"], ["unload", "Unload"], ["pin", "Pin"]]) {
    const button = make("button", word);
    button.type = "button";
    button.dataset.what = what;
    button.dataset.name = c.name;
    button.setAttribute("aria-label", word + " " + c.name);
    cell.append(button);
  }
  return cell;
}

export function drawConsumers(status, now, moving, operator) {
  const total = Math.max(1, status.gpu.total_mib);
  const kinds = new Map();
  for (const [kind, to] of Object.entries(status.routing)) {
    for (const name of [to].flat()) kinds.set(name, [...(kinds.get(name) ?? []), kind]);
  }
  const rows = status.consumers.flatMap((c) => [{key: c.name, c}, ...models.rowsOf(c)]);
  keep(byId("services"), rows, (each) => each.key, (each) => {
    if (each.model || each.more) return models.build(each);
    const {c} = each;
    const tr = row(LABELS), cells = tr.children;
    cells[0].append(make("span", undefined, "who"));
    const who = make("span");
    who.append(make("span", c.name, "name"), make("span", undefined, "dim kinds"));
    cells[0].firstChild.append(make("i"), who);
    cells[1].append(make("span"), make("span", "pinned", "pin"), make("span", undefined, "dim when"),
      make("span", undefined, "dim why"));
    cells[2].append(make("span", undefined, "meter"), make("span"));
    cells[2].firstChild.append(make("span"), make("span", undefined, "need"));
    cells[6].append(actions(c));
    return tr;
  }, (tr, each) => {
    const {c} = each, i = status.consumers.indexOf(c), cells = tr.children;
    if (each.model || each.more) return models.update(tr, each, {i, total, now, moving, operator});
    classes(tr, c.models?.length ? "has-models" : "");
    const [mark, who] = cells[0].firstChild.children, serves = who.lastChild;
    if (mark.textContent !== String(i + 1)) mark.replaceWith(badge(i));
    tell(serves, (kinds.get(c.name) ?? []).join(", "));
    const state = stateOf(c, now), [word, pinned, when, why] = cells[1].children;
    tell(word, state.word + (c.active ? ", working" : c.loaded ? ", loaded" : ""));
    classes(word, state.tone);
    pinned.hidden = !c.pinned;
    tell(when, state.when);
    tell(why, state.why);
    const [meter, figures] = cells[2].children, [bar, need] = meter.children;
    classes(bar, c.gpu_resident_mib ? surface(i) : "");
    bar.style.width = 100 * Math.min(1, c.gpu_resident_mib / total) + "%";
    need.hidden = Boolean(c.models && !c.vram_budget_mib);
    need.style.left = 100 * Math.min(1, c.vram_budget_mib / total) + "%";
    tell(figures, mib(c.gpu_resident_mib) + (c.models && !c.vram_budget_mib ? "" : ` of ${mib(c.vram_budget_mib)}`)
      + (c.gpu_resident_mib && c.resident_source !== "measured" ? ", " + c.resident_source : ""));
    tell(cells[3], c.total_requests);
    const run = c.learned.run_ms;
    tell(cells[4], !run ? "–" : run.count > 4 && run.p95 > 1.5 * run.p50
      ? `${lasting(run.p50)}, at most ${lasting(run.p95)}` : lasting(run.p50));
    tell(cells[5], ago(c.last_used, now));
    for (const button of cells[6].querySelectorAll("button")) {
      button.hidden = !operator;
      button.disabled = moving.has(c.name);
      if (button.dataset.what === "pin") {
        tell(button, c.pinned ? "Unpin" : "Pin");
        button.setAttribute("aria-label", (c.pinned ? "Unpin " : "Pin ") + c.name);
        button.dataset.pinned = c.pinned;
      }
    }
  });
}
