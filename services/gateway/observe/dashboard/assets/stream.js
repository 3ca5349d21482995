// Server-sent events by fetch, because EventSource cannot send a key; and JSON with the same key.

let key = "";

export const setKey = (value) => { key = value; };
export const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** Yields [event, data, comment] of a body of server-sent events. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const lines = text.slice(0, end).split("\n");
        text = text.slice(end + 2);
        const of = (name) => lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length)).join("\n");
        yield [of("event: ") || "message", of("data: "), of(": ")];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export async function refusal(answer) {
  const body = await answer.json().catch(() => null);
  return new Refused(answer.status, body?.error?.message ?? `the gateway answered ${answer.status}`);
}

export async function get(path) {
  const answer = await fetch(path, { headers: authorization(), cache: "no-store" });
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

const SILENT_MS = 4000; // a frame comes every second
const LONGEST_WAIT_MS = 5000;

/** Follow a stream for ever. `on`: {event, live, lost(attempts), refused(error) -> promise to wait for}. */
export async function follow(path, on) {
  for (let attempt = 0; ; attempt++) {
    const stop = new AbortController();
    let watchdog = setTimeout(() => stop.abort(), SILENT_MS);
    try {
      const answer = await fetch(path, { headers: authorization(), cache: "no-store", signal: stop.signal });
      if (!answer.ok) throw await refusal(answer);
      for await (const [event, data] of events(answer.body)) {
        clearTimeout(watchdog);
        watchdog = setTimeout(() => stop.abort(), SILENT_MS);
        attempt = 0;
        on.live();
        on.event(event, JSON.parse(data));
      }
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        clearTimeout(watchdog);
        await on.refused(error);
        attempt = -1;
        continue;
      }
    }
    clearTimeout(watchdog);
    on.lost(attempt);
    const wait = Math.min(LONGEST_WAIT_MS, 300 * 2 ** attempt) * (0.75 + Math.random() / 2);
    await new Promise((resume) => { setTimeout(resume, wait); });
  }
}
