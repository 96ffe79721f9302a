// What happened, in a sentence, and what to do about it.
import {lasting, mib} from "/dashboard/words.js";

const METHODS = {http: "its unload call", unit: "stopping its systemd unit",
  container: "stopping its container", signal: "a signal", checkpoint: "a CUDA checkpoint"};

const CODES = {
  insufficient_vram: ["its model would not fit, even with all others unloaded that may be",
    "See who holds the card's memory: unpin or unload a consumer, or end the foreign process."],
  queue_full: ["the queue was full", "Clients should try again after Retry-After; max_queue limits the queue."],
  queue_timeout: ["it had waited as long as it may", "See what holds the GPU; max_wait limits the wait."],
  consumer_unreachable: ["the consumer could not be reached, or broke off", "Look at the consumer's own log, and start it."],
  consumer_timeout: ["the consumer took too long", "Raise the consumer's timeouts: first_byte for slow models, idle for slow streams."],
  shutting_down: ["the broker was shutting down", ""],
  cancelled: ["it was cancelled", ""],
  no_consumer: ["no consumer is routed for it, or it lacks the path", "See routing and paths in the config."],
  model_not_found: ["no consumer has the model that it named", "Pull the model, or add its name to a consumer's models."],
  client_gone: ["its client disconnected", ""],
  internal_error: ["the broker failed", "Its log has the details under the request id; please report it."],
  scheduler_error: ["the broker failed", "Its log has the details under the request id; please report it."],
};
const because = (code) => (CODES[code] ?? [String(code ?? "").replaceAll("_", " "), ""])[0];
const advice = (code) => (CODES[code] ?? ["", ""])[1];

/** A consumer, or the model of it that an event is about. */
const who = (e) => (e.model ? `${e.consumer}'s model ${e.model}` : e.consumer);

/** How the memory came back: [sentence, advice]. */
function evicted(e) {
  const how = METHODS[e.method] ?? e.method;
  const other = e.target && (e.target !== e.consumer || (e.target_model && e.target_model !== e.model));
  const whom = other ? ` to make room for ${who({consumer: e.target, model: e.target_model})}` : "";
  const began = `${who(e)} was unloaded${whom}`;
  const took = e.ms === undefined ? "" : ` in ${lasting(e.ms)}`;
  const of = `${mib(e.mib ?? 0)} of ${mib(e.expected_mib ?? 0)}`;
  switch (e.outcome) {
    case "released": return [`${began}: ${mib(e.mib ?? 0)} were released${took}.`, ""];
    case "partial": return [`${began}, but only ${of} were released.`,
      "The broker expects it to keep the rest next time, too; floor_mib in the config says so from the start."];
    case "leaked": return [`${began}, but ${of} were released after ${how}.`,
      "Give it another eviction method that works: evict in the config."];
    case "stolen": return [`${began}, but ${e.taken_by ?? "another process"} took the memory at once.`,
      "End that process, or put it behind the broker as a consumer."];
    case "unverified": return [`${began}; the card cannot be measured, so nobody knows whether its memory was released.`, ""];
    case "gone": return [`${e.consumer} had ended already${whom ? " when it was" + whom : ""}.`, ""];
    default: return [`${began}.`, ""];
  }
}

function job(e) {
  const what = `${e.kind} for ${e.client && e.client !== "-" ? e.client : "a client"}`;
  const waits = [e.wait_ms > 50 && `waited ${lasting(e.wait_ms)}`,
    e.prepare_ms > 50 && `${lasting(e.prepare_ms)} to make room and load`].filter(Boolean).join(", ");
  const aside = waits ? ` (${waits})` : "";
  if (e.failure) {
    return [`${e.consumer}: ${what} ended after ${lasting(e.run_ms)}: ${because(e.failure)}${aside}.`,
      advice(e.failure)];
  }
  if (e.status >= 400) {
    return [`${e.consumer} answered ${e.status} to ${what} after ${lasting(e.run_ms)}${aside}.`,
      e.status >= 500 ? "Look at the consumer's own log." : ""];
  }
  return [`${e.consumer} did ${what} in ${lasting(e.run_ms)}${aside}.`, ""];
}

const changed = (e) => ["added", "removed", "changed", "keys"].filter((what) => e[what]?.length)
  .map((what) => `${what} ${[e[what]].flat().join(", ")}`).join("; ");

const SENTENCES = {
  job, evicted,
  trimmed: (e) => [`${e.consumer} gave back ${mib(e.mib ?? 0)} of its caches${e.target ? " for " + e.target : ""}, and stays loaded.`, ""],
  trim_failed: (e) => [`${e.consumer} could not be asked to give back its caches: ${e.reason}.`, "See trim in the config."],
  eviction_failed: (e) => [`${e.consumer} could not be unloaded by ${METHODS[e.method] ?? "its method"}: ${e.reason}.`,
    "Its next eviction method is tried; see evict in the config."],
  eviction_skipped: (e) => [`${e.consumer} was not unloaded for ${e.target}, because it works on somebody else's job.`, ""],
  leaking: (e) => [e.over === "loads"
    ? `${e.consumer} leaks memory: after each unload it keeps ${mib(e.each_mib)} more than after the one before.`
    : `${e.consumer} leaks memory: with each job it holds ${mib(e.each_mib)} more, and does not level off.`,
    e.over === "loads" ? "Restart it, and give it an eviction method that does (unit, container, signal)."
      : "Unload it to get the memory back."],
  loaded_meanwhile: (e) => [`${who(e)} was loaded again by somebody else just after its unload; the broker unloads it again.`,
    "Find out who uses it without the broker."],
  tried_anyway: (e) => [`${who(e)} is tried, although ${mib(e.short_mib)} of ${mib(e.needed_mib)} are missing by the figures.`, ""],
  came_back: (e) => [`${e.consumer}, which a checkpoint had stopped, was started again by somebody else.`, ""],
  loaded: (e) => [`${who(e)} was loaded in ${lasting(e.ms)}.`, ""],
  load_given_up: (e) => [`The load of ${who(e)} was given up, because nobody waits for it any more.`, ""],
  resumed: (e) => [`${e.consumer} was started again in ${lasting(e.ms)}.`, ""],
  started_ahead: (e) => [`${e.consumer} was started while the job before its own still ran.`, ""],
  prefetched: (e) => [`${mib(e.read_mib)} of ${who(e)} were read from the disk while another job ran, for its load.`, ""],
  healthy: (e) => [`${e.consumer} answers.`, ""],
  unhealthy: (e) => [`${e.consumer} does not answer: ${e.reason}.`, "Start it; until then its jobs are refused."],
  call_unclassified: (e) => [`${e.method} ${e.path} of ${e.consumer} took its turn: nothing says whether it is GPU work.`,
    `If it is none, name it in the consumer's not_gpu_work.`],
  on_cpu: (e) => [`${e.consumer} runs partly on the CPU: ${e.models}.`,
    "Raise its vram_resident_mib, then unload it."],
  breaker_open: (e) => [`${e.consumer} failed ${e.failures} times in a row; its jobs are refused for ${lasting(e.pause_ms)}.`,
    "Look at the consumer's own log."],
  breaker_closed: (e) => [`${e.consumer} works again.`, ""],
  out_of_memory: (e) => [`A job of ${who(e)} ran out of memory, although ${mib(e.available_mib)} were available.`,
    "Declare more: vram_resident_mib."],
  out_of_memory_doubted: (e) => [`${e.consumer} says that it ran out of memory, but ${mib(e.available_mib)} were available, and ${mib(e.needed_mib)} were enough before.`,
    "Look at the consumer's own log: another card, or the machine's memory?"],
  out_of_memory_healed: (e) => [`The job of ${e.consumer} was run once more, with the others unloaded, and succeeded.`, ""],
  gpu_unavailable: (e) => [`The card does not report everything: ${e.reason}.`, "gpumanager doctor says what to do."],
  gpu_available: () => ["The card reports everything again.", ""],
  answer_truncated: (e) => [`An answer of ${e.consumer ?? "a consumer"} broke off: ${e.reason}.`, "Look at the consumer's own log."],
  quarantined: (e) => [`${e.consumer} does not release its memory by any eviction method: ${e.reason}.`,
    "Restart it, or unload it here to try once more."],
  async_job_ended: (e) => [`Asynchronous job ${e.job} of ${e.consumer} ${e.state === "done" ? "is done" : e.state === "failed" ? "failed" : e.state === "lost" ? "is lost: the broker ended while it ran" : "was cancelled"}.`,
    e.state === "lost" ? "Submit it again, or set idempotent on the consumer." : ""],
  callback_sent: (e) => [e.told === "delivered" ? `${e.host ?? "The host of its callback"} was told that asynchronous job ${e.job} is over.`
    : `${e.host ?? "The host of its callback"} could not be told that asynchronous job ${e.job} is over: ${e.reason}${e.told === "failed" ? "; that is given up" : ""}.`,
    e.told === "failed" ? "Look at the receiver, and at jobs.callbacks; the result is kept as ever." : ""],
  async_jobs_resumed: (e) => [`${e.jobs} asynchronous jobs of an earlier run wait${e.again ? `; ${e.again} of them are run again` : ""}${e.lost ? `; ${e.lost} are lost` : ""}.`, ""],
  async_jobs_swept: (e) => [`${e.jobs} asynchronous jobs and their results were deleted, as jobs.keep says.`, ""],
  async_jobs_unavailable: (e) => [`Asynchronous jobs cannot be kept: ${e.reason}.`, "Free disk space, or name another folder in jobs.dir."],
  websocket_ended: (e) => [`A WebSocket to ${e.consumer} was closed after ${lasting(e.ms)}: ${e.reason}.`, ""],
  still_busy: (e) => [`${e.consumer} still worked on a job at its time-out; the next job got the GPU.`,
    "Raise timeouts.total, if such jobs take so long."],
  cancel_failed: (e) => [`${e.consumer} could not be told to stop: ${e.reason}.`, "The job holds the GPU until it is done."],
  housekeeping_failed: (e) => [`${e.consumer} could not be ${e.kind === "restore" ? "loaded again while no job waited" : "unloaded for being idle"}: ${e.reason}.`, ""],
  pinned: (e) => [`${who(e)} was pinned: it is not evicted.`, ""],
  unpinned: (e) => [`${who(e)} was unpinned: it may be evicted.`, ""],
  forgotten: (e) => [`What was learned of ${who(e)} was deleted.`, ""],
  config_reloaded: (e) => [`The config was reloaded: ${changed(e) || "nothing changed"}.`, ""],
  config_not_reloaded: (e) => [`The changed config was not applied: ${e.reason ?? "see the log"}.`, "gpumanager check names every fault with its line."],
  draining: () => ["The broker shuts down: it refuses new jobs and finishes those that run.", ""],
  started: (e) => [`The broker started, version ${e.version}.`, ""],
  refused: (e) => e.code === "client_gone" ? [`The client of a job of ${e.consumer} disconnected before its turn.`, ""] : [`A job${e.consumer ? " of " + e.consumer : ""} was refused: ${because(e.code)}.`, advice(e.code)],
};

/** Fields that every event has, or that say only who asked. */
const COMMON = new Set(["number", "time", "event", "level", "consumer", "request_id", "client",
  "path", "ticket", "key", "traceparent"]);

/** One that this page does not know: its name and its fields, in plain text. */
function unknown(e) {
  const fields = Object.entries(e).filter(([name]) => !COMMON.has(name))
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`);
  return [[e.consumer, e.event.replaceAll("_", " ")].filter(Boolean).join(": ")
    + (fields.length ? ` (${fields.join(", ")})` : "") + ".", ""];
}

const WRONG = new Set(["refused", "unhealthy", "breaker_open", "quarantined", "out_of_memory", "answer_truncated",
  "gpu_unavailable", "on_cpu", "eviction_failed", "config_not_reloaded", "still_busy", "cancel_failed", "housekeeping_failed"]);

/** The events that have a sentence of their own. */
export const KNOWN = Object.keys(SENTENCES);

/** {text, remedy, tone, trouble, glyph} of an event. */
export function inWords(e) {
  const [text, remedy] = (Object.hasOwn(SENTENCES, e.event) ? SENTENCES[e.event] : unknown)(e);
  const cancelled = e.failure === "cancelled" || e.failure === "client_gone" 
    || e.code === "cancelled" || e.code === "client_gone";
  const failed = (e.event === "job" && (e.failure || e.status >= 500) && !cancelled)
    || (e.event === "evicted" && ["leaked", "stolen"].includes(e.outcome));
  const trouble = Boolean(failed || (WRONG.has(e.event) && !cancelled) || ["warning", "error"].includes(e.level));
  const tone = e.level === "error" || (trouble && ["job", "refused", "unhealthy", "breaker_open"].includes(e.event))
    ? "bad" : trouble ? "warn" : "";
  const glyph = trouble ? "×" : {evicted: "▼", loaded: "▲", resumed: "▲", job: "■"}[e.event] ?? "·";
  return {text: text.replace(/\.\.$/, "."), remedy, tone, trouble, glyph};
}
