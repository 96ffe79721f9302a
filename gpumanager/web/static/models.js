// The models of a consumer that tells them apart: rows of their own below it.
import {classes, make, row, tell} from "/dashboard/dom.js";
import {hue, surface} from "/dashboard/marks.js";
import {ago, count, lasting, mib, shortened} from "/dashboard/words.js";

const LABELS = ["Model", "State", "Memory", "Jobs", "Usual run", "Last used", "Do"];
/** Models of one consumer that are shown unasked, and how many more than that are still all shown. */
const SHOWN = 5, SPARE = 1;

/** The consumers of which all models are shown. */
const opened = new Set();

/** The models that hold memory of the card now, the largest first. */
export const holding = (c) => (c.models ?? []).filter((model) => model.held_mib > 0)
  .sort((one, other) => other.held_mib - one.held_mib);

/** What the largest of them hold, in words. */
export function largest(c, most = 3) {
  const held = holding(c), words = held.slice(0, most).map((model) => `${shortened(model.name, 28)} ${mib(model.held_mib)}`);
  if (held.length > most) words.push(`${held.length - most} more`);
  return words.join(", ");
}

/** Its models, those that are loaded before those that were used last. */
function sorted(c) {
  const rank = (model) => model.active || model.loaded || model.pinned ? 0 : 1;
  return [...(c.models ?? [])].sort((one, other) => rank(one) - rank(other)
    || other.held_mib - one.held_mib || (other.last_used ?? "").localeCompare(one.last_used ?? ""));
}

/** The rows below a consumer: {key, model}, and at last {key, more}, if some are left out. */
export function rowsOf(c) {
  const models = sorted(c), few = models.length <= SHOWN + SPARE, all = few || opened.has(c.name);
  const rows = models.slice(0, all ? models.length : SHOWN).map((model) => ({key: `${c.name}/${model.name}`, c, model}));
  return few ? rows : [...rows, {key: `${c.name}/`, c, more: models.length, all}];
}

export function toggle(name) {
  if (!opened.delete(name)) opened.add(name);
}

export function build({c, model, more}) {
  if (more) {
    const tr = make("tr", undefined, "more"), td = make("td"), button = make("button");
    tr.setAttribute("role", "row");
    td.setAttribute("role", "cell");
    td.colSpan = LABELS.length;
    button.type = "button";
    button.dataset.more = c.name;
    td.append(button);
    tr.append(td);
    return tr;
  }
  const tr = row(LABELS), cells = tr.children;
  tr.classList.add("model");
  cells[0].append(make("span", undefined, "who"));
  cells[0].firstChild.append(make("i", undefined, "stripe"), make("span", shortened(model.name, 64), "name"));
  cells[0].title = model.name;
  cells[1].append(make("span"), " ", make("span", "pinned", "pin"), " ", make("span", undefined, "dim when"));
  cells[2].append(make("span", undefined, "meter"), make("span"), make("span", undefined, "dim why"));
  cells[2].firstChild.append(make("span"), make("span", undefined, "need"));
  const buttons = make("span", undefined, "buttons");
  for (const what of ["unload", "pin", "forget"]) {
    const button = make("button");
    button.type = "button";
    button.dataset.name = c.name;
    button.dataset.model = model.name;
    button.dataset.what = what;
    buttons.append(button);
  }
  cells[6].append(buttons);
  return tr;
}

/** `i` is the consumer's number, `total` the card's MiB. */
export function update(tr, {c, model, more, all}, {i, total, now, moving, operator}) {
  if (more) {
    const button = tr.querySelector("button");
    tell(button, all ? "Show fewer models" : `Show all ${count(more, "model", "models")}`);
    button.setAttribute("aria-label", `${button.textContent} of ${c.name}`);
    return button.setAttribute("aria-expanded", all);
  }
  const cells = tr.children, [word, pinned, context] = cells[1].children;
  classes(cells[0].firstChild.firstChild, "stripe " + hue(i));
  tell(word, model.active ? "working" : model.loaded ? "loaded" : "not loaded");
  classes(word, model.active ? "good" : model.loaded ? "" : "dim");
  pinned.hidden = !model.pinned;
  tell(context, model.loaded && model.context ? `for ${model.context} tokens` : "");
  const [meter, held, needs] = cells[2].children, [bar, need] = meter.children, needed = model.learned.needed;
  classes(bar, model.held_mib ? surface(i) : "");
  bar.style.width = 100 * Math.min(1, model.held_mib / total) + "%";
  need.style.left = 100 * Math.min(1, needed.mib / total) + "%";
  tell(held, mib(model.held_mib));
  tell(needs, `needs ${mib(needed.mib)}, ${needed.source}`);
  tell(cells[3], model.total_requests);
  tell(cells[4], model.learned.run_ms ? lasting(model.learned.run_ms.p50) : "–");
  tell(cells[5], ago(model.last_used, now));
  for (const button of cells[6].querySelectorAll("button")) {
    let {what} = button.dataset, label = "Forget";
    if (what === "pin") {
      label = model.pinned ? "Unpin" : "Pin";
      button.dataset.pinned = model.pinned;
    } else if (what !== "forget") {
      what = button.dataset.what = model.loaded ? "unload" : "load";
      label = model.loaded ? "Unload" : "Load";
    }
    tell(button, label);
    button.setAttribute("aria-label", `${label} ${model.name} of ${c.name}`);
    button.hidden = !operator;
    button.disabled = moving.has(c.name) || moving.has(`${c.name}/${model.name}`);
  }
}
