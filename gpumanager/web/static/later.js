// Asynchronous jobs: how far each is, and what it came to.
import {byId, classes, keep, make, row, tell} from "/dashboard/dom.js";
import {badge} from "/dashboard/marks.js";
import {about, clockExact, count, lasting, shortened} from "/dashboard/words.js";

const LABELS = ["State", "Consumer", "Kind", "Whose", "Submitted", "Began", "Took", "Result", "Do"];
const PAGE = 20;
/** Asked for again every two seconds: older ones are left to `/v1/jobs?before=`. */
const MOST = 200;
/** A larger result is saved, not shown. */
const SHOWN_BYTES = 8 * 1024 * 1024, SHOWN_LETTERS = 4000;
/** Shown as what they say they are. Whatever else there is is text, or only saved: no page and no
 *  drawing of a consumer's may run here. */
const IMAGES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/avif"];
const SOUNDS = ["audio/wav", "audio/x-wav", "audio/wave", "audio/mpeg", "audio/mp3", "audio/ogg", "audio/flac",
  "audio/x-flac", "audio/aac", "audio/mp4", "audio/opus", "audio/webm"];
const TEXTS = /^(text\/|application\/(x-ndjson|json|xml|.+\+json)$)/;
const ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif", "image/avif": "avif",
  "audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/mpeg": "mp3", "audio/mp3": "mp3",
  "audio/ogg": "ogg", "audio/flac": "flac", "application/json": "json", "text/plain": "txt"};
const TONES = {done: "good", failed: "bad", lost: "bad", cancelled: "dim"};

let most = PAGE;

export const askedFor = () => `/v1/jobs?limit=${most}`;
export function showMore() { most = Math.min(MOST, most + PAGE); }

const typeOf = (job) => (job.content_type ?? "").split(";")[0].trim().toLowerCase();
const over = (job) => job.ended !== null;
export const pathOf = (job) => `/v1/jobs/${encodeURIComponent(job.id)}`;
export const fileOf = (job) => `${job.kind}-${job.id.slice(0, 8)}.${ENDINGS[typeOf(job)] ?? "bin"}`;
export const called = (job) => `${job.kind} job ${job.id.slice(0, 8)}`;

/** How a result can be shown: "image", "sound", "text"; null: it can only be saved. */
export function showsAs(job) {
  const type = typeOf(job);
  if (job.status === null || !job.bytes || job.bytes > SHOWN_BYTES) return null;
  return IMAGES.includes(type) ? "image" : SOUNDS.includes(type) ? "sound" : TEXTS.test(type) ? "text" : null;
}

const size = (bytes) => bytes < 1024 ? bytes + " B" : bytes < 2 ** 20 ? (bytes / 1024).toFixed(1) + " KiB"
  : (bytes / 2 ** 20).toFixed(1) + " MiB";

/** When: with the date where it is not of today. */
function when(time, now) {
  if (!time) return "–";
  const then = new Date(time), today = then.toDateString() === new Date(now).toDateString();
  return (today ? "" : then.toLocaleDateString([], {month: "short", day: "numeric"}) + " ") + clockExact(then);
}

function place(job) {
  if (job.state !== "waiting" || job.position === null) return "";
  const turn = job.estimate_s === null ? "" : `, ${about(job.estimate_s * 1000)}`;
  return `place ${job.position}${turn}`;
}

function outcome(job) {
  if (job.state === "lost") return "the broker ended while it ran";
  if (job.state === "cancelled" || job.status === null) return "–";
  const what = [job.failure ?? (job.status >= 400 ? "status " + job.status : typeOf(job)), size(job.bytes)];
  return what.filter(Boolean).join(", ");
}

/** `counts` are those of the status, `jobs` the newest of those that this key may see, `more`:
 *  there are older ones. */
export function drawLater({status, jobs, more, now}) {
  const names = status.consumers.map((c) => c.name), counts = status.jobs ?? {};
  const section = byId("later");
  if (section.hidden !== (jobs.length === 0)) section.hidden = jobs.length === 0;
  const told = ["waiting", "running", "done", "failed", "cancelled", "lost"].filter((state) => counts[state])
    .map((state) => `${counts[state]} ${state}`);
  // The counts are of all keys' jobs; a client's key sees its own.
  tell(byId("h-later"), "Asynchronous jobs" + (told.length && status.role === "admin" ? ": " + told.join(", ") : ""));
  keep(byId("later-rows"), jobs, (job) => job.id, (job) => {
    const tr = row(LABELS), cells = tr.children;
    cells[0].append(make("span"), make("span", undefined, "when dim"));
    cells[1].append(make("span", undefined, "who"));
    const who = make("span");
    who.append(make("span", undefined, "name"), make("span", undefined, "dim name which"));
    cells[1].firstChild.append(make("i"), who);
    cells[7].append(make("span", undefined, "name"), make("span", undefined, "buttons"));
    const show = make("button", "Show"), save = make("a", "Save");
    show.type = "button";
    show.dataset.show = job.id;
    show.setAttribute("aria-label", `Show the result of ${called(job)}`);
    save.dataset.save = job.id;
    save.href = pathOf(job) + "/result";
    save.setAttribute("aria-label", `Save the result of ${called(job)}`);
    cells[7].lastChild.append(show, save);
    const button = make("button", "Cancel");
    button.type = "button";
    button.dataset.job = job.id;
    button.setAttribute("aria-label", `Cancel ${called(job)}`);
    cells[8].append(button);
    tr.title = "job " + job.id;
    return tr;
  }, (tr, job) => {
    const cells = tr.children, i = names.indexOf(job.consumer), who = cells[1].firstChild;
    classes(cells[0].firstChild, TONES[job.state] ?? "");
    tell(cells[0].firstChild, job.state);
    tell(cells[0].lastChild, place(job));
    if (i >= 0 && who.firstChild.textContent !== String(i + 1)) who.firstChild.replaceWith(badge(i));
    tell(who.lastChild.firstChild, job.consumer);
    tell(who.lastChild.lastChild, job.model ? shortened(job.model, 48) : "");
    who.title = job.model ?? "";
    tell(cells[2], job.kind + (job.urgency === 5 ? "" : ` u=${job.urgency}`));
    tell(cells[3], job.requester);
    tell(cells[4], when(job.created, now));
    tell(cells[5], when(job.started, now));
    tell(cells[6], job.started ? lasting((job.ended ? new Date(job.ended) : now) - new Date(job.started)) : "–");
    tell(cells[7].firstChild, outcome(job));
    const [show, save] = cells[7].lastChild.children;
    show.hidden = !over(job) || showsAs(job) === null;
    save.hidden = !over(job) || job.status === null || !job.bytes;
    cells[7].lastChild.hidden = show.hidden && save.hidden;
    // In cards, what there is nothing to say of yet would only take room.
    for (const n of [5, 6]) cells[n].classList.toggle("none", !job.started);
    cells[7].classList.toggle("none", !over(job));
    if (save.download !== fileOf(job)) save.download = fileOf(job);
    const button = cells[8].firstChild;
    button.hidden = over(job);
    button.dataset.sent = job.state === "running" || job.state === "preparing";
    classes(tr, job.state === "running" || job.state === "preparing" ? "runs" : "");
  });
  const button = byId("later-more");
  button.hidden = !more || most >= MOST;
  byId("later-rest").hidden = !more || most < MOST;
  tell(byId("later-rest"), `The newest ${count(MOST, "is", "are")} shown; GET /v1/jobs lists all, page by page.`);
}

/** Put a result into the dialog. `blob` holds it; what the consumer says it is does not count. */
export async function drawResult(job, blob) {
  const how = showsAs(job), box = byId("result-box");
  tell(byId("result-what"), `Result of ${called(job)}`);
  tell(byId("result-why"), `${job.consumer}, ${outcome(job)}`);
  box.replaceChildren();
  if (how === "text") {
    const text = await blob.text(), words = readable(text, typeOf(job));
    const shown = make("pre", words.slice(0, SHOWN_LETTERS));
    shown.tabIndex = 0;
    shown.setAttribute("aria-label", "The result's text");
    box.append(shown);
    if (words.length > SHOWN_LETTERS) box.append(make("p", `The first ${SHOWN_LETTERS} of ${words.length} letters.`, "dim"));
    return () => {};
  }
  const address = URL.createObjectURL(new Blob([blob], {type: typeOf(job)}));
  const element = make(how === "image" ? "img" : "audio");
  if (how === "image") element.alt = `The picture that ${job.consumer} made for ${called(job)}`;
  else {
    element.controls = true;
    element.setAttribute("aria-label", `What ${job.consumer} said for ${called(job)}`);
  }
  element.addEventListener("error", () => box.replaceChildren(make("p", `It is no ${typeOf(job)} that this browser can show. Save it instead.`, "bad")));
  element.src = address;
  box.append(element);
  return () => { box.replaceChildren(); URL.revokeObjectURL(address); };
}

/** JSON with indents, and its long texts (a picture in base64) cut. */
function readable(text, type) {
  if (!type.endsWith("json")) return text;
  try {
    return JSON.stringify(JSON.parse(text), (_, value) =>
      typeof value === "string" && value.length > 1000 ? value.slice(0, 200) + `… (${value.length} letters)` : value, 2);
  } catch { return text; }
}

/** Have the browser save it, under a type that it never shows. */
export function save(job, blob) {
  const address = URL.createObjectURL(new Blob([blob], {type: "application/octet-stream"}));
  const link = make("a");
  link.href = address;
  link.download = fileOf(job);
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
