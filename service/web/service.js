// What the page asks of the service that sent it, and the words in which others can ask the same.

const KEY = "limner-api-key"; // of sessionStorage: gone with the tab

/** What the service says when it refuses: the members of its problem+json. */
export class Problem extends Error {
  constructor(title, detail, status = 0, requestId = "") {
    super(title);
    Object.assign(this, { title, detail, status, requestId });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export const models = async () => (await call("models")).json();
export const modelNamed = async (name) => (await call(`models/${encodeURIComponent(name)}`)).json();

/** `query` is an object of options; `blob` the encoded picture. Raises Problem, or AbortError by `signal`. */
export function detect(blob, query, signal) {
  const headers = { "Content-Type": "application/octet-stream" };
  return call(`detect?${new URLSearchParams(query)}`, { method: "POST", body: blob, headers, signal });
}

async function call(path, init = {}) {
  const headers = { ...init.headers, ...(key.get() && { Authorization: `Bearer ${key.get()}` }) };
  let answer;
  try {
    answer = await fetch(path, { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service did not answer", "It may have been stopped, or the network is gone. Try again.");
  }
  if (answer.ok) return answer;
  throw await problemOf(answer);
}

/** A proxy in front of the service may answer with something else than a problem. */
async function problemOf(answer) {
  const told = await answer.json().catch(() => ({}));
  const title = told.title ?? `The answer was ${answer.status} ${answer.statusText}`;
  return new Problem(title, told.detail ?? "", answer.status, told.request_id ?? "");
}

/** The command line, for a shell, that asks for what `query` says. The key itself stays out of it. */
export function curlLine(name, query) {
  const url = new URL(`detect?${new URLSearchParams(query)}`, document.baseURI);
  const shown = key.get() ? `-H "Authorization: Bearer $LIMNER_API_KEY" ` : "";
  return `curl ${shown}--data-binary ${quoted(`@${name}`)} "${url}"`;
}

const quoted = (word) => (/^[\w@.,+-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`);
