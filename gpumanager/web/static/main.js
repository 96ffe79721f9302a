// Asks the broker every two seconds, has everything drawn, and does what the buttons say.
import {LONG_MS, Unanswered, ask, fetchBytes, hasKey, storeKey, useKey} from "/dashboard/api.js";
import {drawAttention, drawEvents} from "/dashboard/attention.js";
import {drawCard} from "/dashboard/card.js";
import {drawChart, watchCursor} from "/dashboard/chart.js";
import {drawConsumers} from "/dashboard/consumers.js";
import {toggle} from "/dashboard/models.js";
import {askedFor, called, drawLater, drawResult, pathOf, save, showMore} from "/dashboard/later.js";
import {byId, classes, tell} from "/dashboard/dom.js";
import {drawQueue} from "/dashboard/queue.js";
import {clockExact, lasting, mib} from "/dashboard/words.js";

const EVERY_MS = 2000, HISTORY_EVERY_MS = 2000, HOUR_EVERY_MS = 10000, KEPT = 5000;

let status = null, events = [], last = 0, boot = null, samples = [], historyAt = 0, historyOf = 0;
let later = [], laterMore = false;
let lastAnswer = null, skew = 0, drawnAt = 0;
const moving = new Set();

const seconds = () => Number(document.querySelector("input[name=span]:checked").value);
/** Now, on the broker's clock: what it tells is stamped with it. */
const now = () => Date.now() + skew;
const operator = () => status?.role !== "client";

// -- what is shown ---------------------------------------------------------------------------

function say(word, className) {
  tell(byId("state"), word);
  classes(byId("state"), className);
}

function stale(word) {
  document.body.classList.add("stale");
  document.title = "× gpumanager";
  say(word + (lastAnswer ? "; what is shown is from " + clockExact(lastAnswer) : ""), "bad");
}

/** Draw what was; `anew` also where less than a pixel or two would have moved since. */
function drawTimes(anew = false) {
  const span = seconds();
  if (!status || !anew && Date.now() - drawnAt < 1.5 * span) return;
  drawnAt = Date.now();
  drawChart({status, events, samples, now: now(), seconds: span});
}

function drawAll() {
  drawCard(status);
  drawQueue(status, (entry) => operator() || entry.request_id !== "-");
  drawConsumers(status, now(), moving, operator());
  const wrong = drawAttention(status, now());
  document.title = (wrong ? `(${wrong}) ` : "") + "gpumanager";
  tell(byId("what"), `${status.version} on ${status.listen}${status.gpu.name ? ", " + status.gpu.name : ""}`
    + (status.gpu.memory === "host" ? ", whose memory is the host's" : "")
    + (operator() ? "" : "; this key sees and cancels its own jobs"));
  byId("broker-buttons").hidden = false;
  for (const id of ["reload", "drain"]) byId(id).hidden = !operator();
  byId("other-key").hidden = !hasKey();
}

// -- asking ----------------------------------------------------------------------------------

async function lookAtEvents() {
  let news = false;
  for (let turn = 0; turn < 10; turn++) {
    const answer = await ask("/v1/events?since=" + last);
    if (!answer.ok) return;
    const found = answer.body;
    if (boot !== null && boot !== found.boot) { boot = null; events = []; last = 0; news = true; continue; }
    boot = found.boot; last = found.last;
    for (const event of found.events) event.at = Date.parse(event.time);
    events = events.concat(found.events).slice(-KEPT);
    news ||= found.events.length > 0;
    if (found.events.length < 1000) break;
  }
  if (news || !byId("events").hasChildNodes()) drawEvents(events);
}

async function lookAtHistory() {
  const span = seconds(), every = span > 900 ? HOUR_EVERY_MS : HISTORY_EVERY_MS;
  if (span === historyOf && Date.now() - historyAt < every) return;
  // A little more, so that the curve comes in from the left edge.
  const answer = await ask("/v1/history?seconds=" + Math.min(3600, span + 10));
  if (!answer.ok) return;
  samples = answer.body.samples;
  for (const sample of samples) sample.at = Date.parse(sample.time);
  historyAt = Date.now(); historyOf = span;
}

/** The newest asynchronous jobs, if there are any. */
async function lookAtLater() {
  const any = Object.values(status.jobs ?? {}).some((count) => count > 0);
  if (!any && later.length === 0) return;
  const answer = await ask(askedFor());
  if (!answer.ok) return;
  later = answer.body.jobs;
  laterMore = answer.body.before !== undefined;
  drawLater({status, jobs: later, more: laterMore, now: now()});
}

function askForKey(refused) {
  byId("ask").hidden = false;
  byId("main").hidden = true;
  byId("broker-buttons").hidden = true;
  if (refused) {
    useKey(null);
    tell(byId("key-said"), "The broker does not know this key. Look for a missing character, or ask who runs it for one.");
    byId("key").focus();
  }
  stale("a key is needed");
}

let looks = Promise.resolve();
/** Ask for everything and draw it; one look at a time, since events are added to those before. */
const look = () => (looks = looks.then(lookOnce));

async function lookOnce() {
  try {
    const answer = await ask("/v1/status");
    if (answer.status === 401) return askForKey(hasKey());
    if (!answer.ok) return stale("the broker answered " + answer.status);
    storeKey();
    byId("ask").hidden = true;
    byId("main").hidden = false;
    tell(byId("key-said"), "");
    status = answer.body;
    skew = Date.parse(status.time) - Date.now();
    const health = await ask("/healthz");
    lastAnswer = new Date();
    document.body.classList.remove("stale");
    if (health.ok) say("live", "good"); else say("shutting down", "warn");
    drawAll();
    await lookAtLater();
    await lookAtEvents();
    await lookAtHistory();
    drawTimes();
  } catch (error) {
    if (error instanceof Unanswered) return stale("the broker does not answer");
    stale("this page failed");
    console.error(error);
  }
}

// -- doing -----------------------------------------------------------------------------------

function answerWith(words, className) {
  const said = byId("said");
  classes(said, className);
  tell(said, words);
  byId("said-gone").hidden = words === "";
}

/** Ask in a dialog; resolves to whether the answer was yes. */
function sure(what, why, yes, no) {
  const dialog = byId("sure");
  tell(byId("sure-what"), what);
  tell(byId("sure-why"), why);
  tell(byId("sure-yes"), yes);
  tell(byId("sure-no"), no);
  dialog.returnValue = "no";
  dialog.showModal();
  byId("sure-no").focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), {once: true});
  });
}

/** Do something, and say what came of it. `done` makes a sentence of the answer. */
async function act(path, options, done) {
  try {
    const {ok, status: code, body} = await ask(path, options);
    answerWith(ok ? done(body) : body.message ?? `The broker answered ${code}.`, ok ? "good" : "bad");
  } catch (error) {
    if (!(error instanceof Unanswered)) throw error;
    answerWith("The broker did not answer.", "bad");
  }
  await look();
}

async function cancel(button) {
  const ticket = button.dataset.ticket;
  if (button.dataset.running === "true" && !await sure("Stop the running job?",
    `It is the ${button.dataset.words}. What it did so far is lost, and its client is told 503 cancelled.`,
    "Stop it", "Let it run")) return;
  await act("/v1/queue/" + ticket, {method: "DELETE"}, () => `Ticket ${ticket} is cancelled.`);
}

const jobOf = (id) => later.find((job) => job.id === id);

async function cancelLater(button) {
  const job = jobOf(button.dataset.job);
  if (!job) return;
  if (button.dataset.sent === "true" && !await sure("Stop the running job?",
    `It is the ${called(job)} of ${job.consumer}. What it did so far is lost.`, "Stop it", "Let it run")) return;
  await act(pathOf(job), {method: "DELETE"}, (body) => body.state === "cancelled"
    ? `The ${called(job)} is cancelled.` : `The ${called(job)} is ${body.state}; it ends as soon as its consumer lets it.`);
}

/** Beyond this a result is not taken into the page's memory, which is where a key's can be saved from. */
const SAVED_BYTES = 512 * 1024 * 1024;

async function saveResult(link, event) {
  const job = jobOf(link.dataset.save);
  if (!job || !hasKey() && job.status === 200) return;  // the browser saves what the link leads to
  event.preventDefault();
  if (job.bytes > SAVED_BYTES) {
    return answerWith(`It is too large for this page. Fetch ${pathOf(job)}/result with the key.`, "warn");
  }
  const blob = await bytesOf(job);
  if (blob) save(job, blob);
}

async function bytesOf(job) {
  try {
    return await fetchBytes(pathOf(job) + "/result");
  } catch (error) {
    if (!(error instanceof Unanswered)) throw error;
    answerWith("The broker did not answer.", "bad");
    return null;
  }
}

let closeResult = () => {};
async function showResult(button) {
  const job = jobOf(button.dataset.show), blob = job && await bytesOf(job);
  if (!blob) return;
  closeResult();
  closeResult = await drawResult(job, blob);
  if (!byId("result").open) byId("result").showModal();
}

const MOVES = {
  load: (name) => ["/load", "POST", `Loading ${name}, in its turn…`, (body) =>
    `${name} is ${body.loaded ? "loaded" : "ready"}, after ${lasting(body.ms)}.`],
  unload: (name) => ["/unload", "POST", `Unloading ${name}, in its turn…`, (body) =>
    `${name}: ${body.outcome}, ${mib(body.mib)} in ${lasting(body.ms)}.`],
  pin: (name, pinned) => ["/pin", pinned ? "DELETE" : "POST", "", () => pinned
    ? `${name} may be evicted again.` : `${name} is not evicted any more, until it is unpinned or the broker ends.`],
  forget: (name) => ["/learned", "DELETE", "", (body) =>
    `${name}: forgotten; room is made for ${mib(body.needed.mib)} from now on.`],
};

async function move(button) {
  const {name, model, what} = button.dataset, key = model === undefined ? name : `${name}/${model}`;
  if (moving.has(key)) return;
  const whom = model === undefined ? name : `${name}'s model ${model}`;
  const query = model === undefined ? "" : `?model=${encodeURIComponent(model)}`;
  if (what === "forget" && !await sure(`Forget what was learned of ${whom}?`,
    "Its memory and times are learned again from its next jobs.", "Forget it", "Keep it")) return;
  const [path, method, began, done] = MOVES[what](whom, button.dataset.pinned === "true");
  moving.add(key);
  if (began) answerWith(began, "dim");
  try {
    await act(`/v1/consumers/${encodeURIComponent(name)}${path}${query}`, {method, patience: LONG_MS}, (body) => {
      moving.delete(key);
      return done(body);
    });
  } finally {
    moving.delete(key);
    drawConsumers(status, now(), moving, operator());
  }
}

byId("queue-rows").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-ticket]");
  if (button) cancel(button);
});
byId("later-rows").addEventListener("click", (event) => {
  const found = event.target.closest("[data-job], [data-show], [data-save]");
  if (!found) return;
  if (found.dataset.job) cancelLater(found);
  else if (found.dataset.show) showResult(found);
  else saveResult(found, event);
});
byId("later-more").addEventListener("click", () => {
  showMore();
  look();
});
byId("result").addEventListener("close", () => {
  closeResult();
  closeResult = () => {};
});
byId("services").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-name]");
  if (button) return move(button);
  const more = event.target.closest("button[data-more]");
  if (!more) return;
  toggle(more.dataset.more);
  drawConsumers(status, now(), moving, operator());
});
byId("reload").addEventListener("click", () => act("/v1/reload", {method: "POST", patience: LONG_MS}, (body) => {
  const parts = Object.entries(body).filter(([, names]) => names.length)
    .map(([what, names]) => `${what} ${names.join(", ")}`);
  return parts.length ? `The changed config is applied: ${parts.join("; ")}.` : "The config has not changed.";
}));
byId("drain").addEventListener("click", async () => {
  if (await sure("End the broker?", "It refuses new jobs, finishes those that run, and ends. Afterwards "
    + "only systemd or somebody on its machine can start it again.", "End it", "Let it run")) {
    await act("/v1/drain?boot=" + encodeURIComponent(boot), {method: "POST"}, () => "The broker shuts down.");
  }
});
byId("other-key").addEventListener("click", () => {
  useKey(null);
  look();
});
byId("said-gone").addEventListener("click", () => answerWith("", ""));
byId("span").addEventListener("change", async () => {
  drawTimes(true);
  try { await lookAtHistory(); } catch { return; }
  drawTimes(true);
});
byId("which").addEventListener("change", () => drawEvents(events));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  byId("key").value = "";
  look();
});
new ResizeObserver(() => drawTimes(true)).observe(byId("chart-box"));
watchCursor();
(async function forever() {
  if (!document.hidden) await look();
  setTimeout(forever, EVERY_MS);
})();
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
