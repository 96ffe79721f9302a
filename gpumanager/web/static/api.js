// Asking the broker.

const PATIENCE_MS = 5000;
/** Loads, unloads and reloads wait in the queue. */
export const LONG_MS = 600000;

let key = sessionStorage.getItem("gpumanager-key");

export const hasKey = () => Boolean(key);
/** The key of this tab, or null to forget it. It is stored once the broker took it. */
export function useKey(secret) {
  key = secret;
  sessionStorage.removeItem("gpumanager-key");
}
export function storeKey() {
  if (key) sessionStorage.setItem("gpumanager-key", key);
}

/** The broker did not answer, or not in time, or not in full. */
export class Unanswered extends Error {}

const headers = () => key ? {"X-Api-Key": key} : {};

/** A result's bytes, as the consumer sent them. Nowhere else: the key goes to the broker alone. Throws Unanswered. */
export async function fetchBytes(path) {
  try {
    const answer = await fetch(path, {headers: headers(), cache: "no-store", redirect: "manual",
      signal: AbortSignal.timeout(LONG_MS)});
    return await answer.blob();
  } catch (error) {
    throw new Unanswered(String(error));
  }
}

/** {ok, status, body} of an answer in JSON. Throws Unanswered. */
export async function ask(path, {method = "GET", patience = PATIENCE_MS} = {}) {
  try {
    const answer = await fetch(path, {method, headers: headers(), cache: "no-store",
      signal: AbortSignal.timeout(patience)});
    return {ok: answer.ok, status: answer.status, body: await answer.json()};
  } catch (error) {
    throw new Unanswered(String(error));
  }
}
