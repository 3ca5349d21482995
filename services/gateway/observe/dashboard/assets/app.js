// Puts the page together: one stream of events in, every part shown, and a word on whether it is still live.
import { $ } from "./dom.js";
import { ago, clock } from "./format.js";
import { Chat } from "./chat.js";
import { Overview } from "./overview.js";
import { Requests } from "./requests.js";
import { services } from "./services.js";
import { follow, setKey } from "./stream.js";

const overview = new Overview();
const requests = new Requests();
let frame = null, lastMs = null;
new Chat(() => frame?.model);

function now(data) {
  frame = data;
  lastMs = Date.now();
  $("#model").textContent = data.model;
  const gateways = data.services.filter((row) => row.role === "gateway" && row.state !== "lost" && row.state !== "stopped").length;
  const engine = data.services.find((row) => row.engine)?.engine;
  $("#about").textContent = [engine && `${engine} engine`, data.arrangement, `up ${ago(data.up_s)}`, `Baton ${data.version}`].filter(Boolean).join(" · ");
  $("#scope").textContent = gateways > 1 ? `all ${gateways} gateways together` : "";
  document.title = `${data.model} – Baton`;
  overview.now(data);
  services(data);
  requests.now(data);
}

function status(kind, text) {
  const place = $("#status");
  if (place.textContent !== text) place.textContent = text;
  place.className = `status ${kind}`;
  $("#main").classList.toggle("stale", kind !== "live");
}

function askForKey(wrong) {
  const dialog = $("#key"), text = $("#key-text");
  $("#key-error").textContent = wrong;
  status("", "waiting for a key");
  text.value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((given) => {
    dialog.oncancel = (event) => event.preventDefault(); // there is nothing to see without
    $("#key-form").onsubmit = (event) => {
      event.preventDefault();
      setKey(text.value.trim());
      text.value = "";
      dialog.close();
      given();
    };
  });
}

let past = null;
const on = {
  event(name, data) {
    if (name === "history") past = data;
    else now(data);
    if (name === "history" && frame) overview.past(past, frame);
    else if (name === "now" && past && !overview.history) { overview.history = past; overview.past(past, frame); }
  },
  live: () => status("live", "live"),
  lost(attempt) {
    if (attempt < 1) status("", "connecting again");
    else status("gone", `the gateway is gone${lastMs ? ` since ${clock(lastMs)}` : ""}; trying again`);
  },
  refused: (error) => askForKey(error.message),
};

if (document.documentElement.dataset.keys === "wanted") await askForKey("");
follow("/dashboard/events", on);
