// A conversation with the model, streamed as any client would.
import { $, h } from "./dom.js";
import { ms, number } from "./format.js";
import { authorization, events, refusal } from "./stream.js";

const LONGEST = 512; // tokens of an answer: without a bound some models go on to the end of their context

export class Chat {
  constructor(model) {
    this.model = model; // () -> its name
    this.messages = [];
    this.running = null;
    this.log = $("#chat-log");
    this.text = $("#chat-text");
    this.button = $("#chat-send");
    $("#chat-form").addEventListener("submit", (event) => { event.preventDefault(); this.press(); });
    $("#chat-clear").addEventListener("click", () => this.clear());
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.running) this.press();
    });
  }

  press() {
    if (this.running) { this.running.abort(); return; }
    const said = this.text.value.trim();
    if (!said || !this.model()) return;
    this.text.value = "";
    if (!this.messages.length) this.log.replaceChildren();
    this.say("user", said);
    this.messages.push({ role: "user", content: said });
    this.answer();
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    this.log.replaceChildren();
    $("#chat-clear").hidden = true;
  }

  say(kind, text) {
    const line = h("p", { class: kind }, text);
    this.log.append(line);
    this.log.scrollTop = this.log.scrollHeight;
    return line;
  }

  async answer() {
    const stop = this.running = new AbortController();
    const messages = this.messages, line = this.say("assistant", ""), began = performance.now();
    this.button.textContent = "Stop";
    this.log.setAttribute("aria-busy", "true");
    $("#chat-clear").hidden = false;
    let text = "", first = null, usage = null, receipt = {}, cut = false;
    try {
      const answer = await fetch("/v1/chat/completions", {
        method: "POST", signal: stop.signal, headers: { "Content-Type": "application/json", ...authorization() },
        body: JSON.stringify({ model: this.model(), messages, max_tokens: LONGEST, stream: true, stream_options: { include_usage: true } }),
      });
      if (!answer.ok) throw await refusal(answer);
      for await (const [, data, comment] of events(answer.body)) {
        if (comment.startsWith("baton-receipt ")) receipt = JSON.parse(comment.slice(14));
        if (!data || data === "[DONE]") continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        cut ||= chunk.choices?.[0]?.finish_reason === "length";
        const delta = chunk.choices?.[0]?.delta?.content;
        if (!delta) continue;
        first ??= performance.now();
        text += delta;
        const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
        line.textContent = text;
        if (atEnd) this.log.scrollTop = this.log.scrollHeight;
      }
      this.say("note", note(receipt, usage, first === null ? null : first - began, performance.now() - (first ?? began)) + (cut ? " · cut off there" : ""));
    } catch (error) {
      this.say(stop.signal.aborted ? "note" : "note bad", stop.signal.aborted ? "stopped" : error.message);
    } finally {
      if (this.running === stop) {
        this.running = null;
        this.button.textContent = "Send";
        this.log.setAttribute("aria-busy", "false");
      }
      if (text) messages.push({ role: "assistant", content: text });
      else messages.pop();
    }
  }
}

function note(receipt, usage, ttftMs, decodingMs) {
  const tokens = usage?.completion_tokens ?? 0;
  const parts = [`first token ${ms(ttftMs)}`, `${tokens} tokens`];
  if (tokens > 1 && decodingMs > 0) parts.push(`${number(((tokens - 1) / decodingMs) * 1000)}/s`);
  if (receipt.path) parts.push(`${receipt.path}: ${[receipt.prefill, receipt.decode].filter(Boolean).join(" → ")}`);
  return parts.join(" · ");
}
