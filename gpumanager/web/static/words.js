// Figures and moments in words.

export const mib = (figure) =>
  figure >= 10240 ? (figure / 1024).toFixed(1) + " GiB" : Math.round(figure) + " MiB";

/** A name in at most so many characters, cut in its middle: models' names differ at their ends. */
export function shortened(name, most) {
  const letters = [...name], front = Math.floor((most - 1) / 2);
  return letters.length <= most ? name
    : letters.slice(0, front).join("") + "…" + letters.slice(front + 1 - most).join("");
}

/** How long so many milliseconds are. */
export function lasting(ms) {
  const s = Math.max(0, ms / 1000);
  if (s < 1) return Math.round(Math.max(0, ms)) + " ms";
  if (s < 90) return s.toFixed(s < 10 ? 1 : 0) + " s";
  if (s < 600 && Math.round(s) % 60) return Math.floor(s / 60) + " min " + (Math.round(s) % 60) + " s";
  if (s < 5400) return Math.round(s / 60) + " min";
  return s < 172800 ? Math.round(s / 3600) + " h" : Math.round(s / 86400) + " days";
}

/** An estimate: never more exact than it can be, and never a bare 0. */
export function about(ms) {
  const s = Math.max(0, ms / 1000);
  if (s < 1) return "any moment";
  if (s < 10) return "≈ " + Math.round(s) + " s";
  if (s < 90) return "≈ " + Math.round(s / 5) * 5 + " s";
  return "≈ " + (s < 5400 ? Math.round(s / 60) + " min" : Math.round(s / 3600) + " h");
}

export const ago = (time, now) => time ? lasting(now - new Date(time)) + " ago" : "never";

const CLOCK = {hour: "2-digit", minute: "2-digit", hourCycle: "h23"};
const TO_THE_MINUTE = new Intl.DateTimeFormat([], CLOCK);
const TO_THE_SECOND = new Intl.DateTimeFormat([], {...CLOCK, second: "2-digit"});
export const clock = (time) => TO_THE_MINUTE.format(new Date(time));
export const clockExact = (time) => TO_THE_SECOND.format(new Date(time));

/** Since when: with the date where it is not of today. */
export function since(time, now) {
  const then = new Date(time);
  const today = then.toDateString() === new Date(now).toDateString();
  const day = today ? "" : then.toLocaleDateString([], {month: "short", day: "numeric"}) + " ";
  return `since ${day}${clock(then)} (${lasting(now - then)})`;
}

export const count = (n, one, many) => n + " " + (n === 1 ? one : many);
