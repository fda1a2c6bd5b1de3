// The page: what is shown, what runs, and who is told.

import { Composer } from "./composer.js";
import { byId, el, icon } from "./dom.js";
import { explain } from "./failures.js";
import { watchServer } from "./health.js";
import { MessageList } from "./list.js";
import { settings, settingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { allConversations, newConversation, saveConversation, shownId } from "./store.js";
import { chooseTheme, shownTheme } from "./theme.js";
import { toast } from "./toast.js";
import { emptyAnswer, requestBody, streamInto } from "./turn.js";

const SAVE_MS = 1000;
const MAX_TITLE_CHARS = 60;
const RETRIED_CODES = new Set(["server_loading", "server_draining"]);
const EXAMPLES = [
  "Explain how a hash table works, with a short example in Python.",
  "Plan a three-day trip to Lisbon as a table.",
  "Write a polite reply that turns down a meeting.",
];

/** Answers being written, by the id of their conversation: {conversation, answer, controller}. */
const runs = new Map();

let shown = allConversations().find(({ id }) => id === shownId.get()) ?? newConversation();

const panel = settingsPanel(() => {
  makeThemeButton();
  list.show(shown, runningAnswer());
  watchServer(showModel);
});
const list = new MessageList({
  retry: () => retry(),
  newChat: () => startNew(),
  openKey: () => panel.open("set-key"),
  answerCall: (call, text) => answerCall(call, text),
});
const composer = new Composer({ send: (text) => send(text), stop: () => stop() });
const sidebar = new Sidebar({
  choose: (conversation) => show(runs.get(conversation.id)?.conversation ?? conversation),
  newChat: () => startNew(),
  shownId: () => shown.id,
  renamed: (conversation, title) => rename(conversation, title),
  deleted: (id) => forget(id),
});

const runningAnswer = () => runs.get(shown.id)?.answer ?? null;

function show(conversation) {
  shown = conversation;
  shownId.set(conversation.id);
  list.show(conversation, runningAnswer());
  composer.setRunning(runs.has(conversation.id));
  showTitle();
  sidebar.refresh();
}

function showTitle() {
  byId("title").textContent = shown.title || "New chat";
  document.title = shown.title ? `${shown.title} \u00b7 Harmonium` : "Harmonium";
}

function startNew() {
  show(newConversation());
  composer.field.focus();
}

function rename(conversation, title) {
  const live = conversation.id === shown.id ? shown : (runs.get(conversation.id)?.conversation ?? conversation);
  live.title = title;
  save(live);
  showTitle();
}

function forget(id) {
  runs.get(id)?.controller.abort();
  runs.delete(id);
  if (id === shown.id) startNew();
}

function save(conversation) {
  if (!saveConversation(conversation)) {
    toast("This browser has no room left for conversations. Export and delete some.");
  }
}

function send(text) {
  if (!shown.title) shown.title = titleFrom(text);
  shown.messages.push({ role: "user", content: text });
  list.add(shown.messages.at(-1));
  shown.updated = Date.now();
  run();
}

function titleFrom(text) {
  const line = text.split("\n")[0];
  return line.length > MAX_TITLE_CHARS ? `${line.slice(0, MAX_TITLE_CHARS - 1).trimEnd()}\u2026` : line;
}

/** Ask for the last answer again. */
function retry() {
  if (runs.has(shown.id)) return;
  while (shown.messages.at(-1)?.role === "assistant") shown.messages.pop();
  list.show(shown, null);
  run();
}

/** Take the reader's result for a call; when every call has one, the model goes on. */
function answerCall(call, text) {
  const answer = shown.messages.findLast(({ role }) => role === "assistant");
  shown.messages.push({ role: "tool", callId: call.id, content: text });
  save(shown);
  list.refresh(shown, null);
  const given = new Set(shown.messages.filter(({ role }) => role === "tool").map(({ callId }) => callId));
  if (answer.toolCalls.every(({ id }) => given.has(id))) run();
}

async function run() {
  const conversation = shown;
  const answer = emptyAnswer();
  const controller = new AbortController();
  const { messages } = conversation;
  const body = requestBody([...messages], settings());
  messages.push(answer);
  runs.set(conversation.id, { conversation, answer, controller });
  beginView(conversation, answer);
  const view = frameLimited(() => updateView(conversation, answer));
  const keep = setInterval(() => save(conversation), SAVE_MS);
  try {
    await streamInto(answer, body, controller.signal, view);
  } catch (error) {
    settleFailure(answer, error);
  }
  clearInterval(keep);
  // A deleted conversation is no longer among the runs, and is not to come back.
  if (runs.get(conversation.id)?.answer === answer) endRun(conversation, answer);
}

function beginView(conversation, answer) {
  save(conversation);
  shownId.set(conversation.id);
  list.add(answer);
  list.refresh(conversation, answer);
  list.follow();
  composer.setRunning(true);
  showTitle();
  sidebar.refresh();
}

function endRun(conversation, answer) {
  runs.delete(conversation.id);
  save(conversation);
  updateView(conversation, answer);
  if (conversation === shown) composer.setRunning(false);
}

function updateView(conversation, answer) {
  if (conversation === shown) list.update(conversation, answer, runningAnswer());
}

function settleFailure(answer, error) {
  if (error.name === "AbortError") {
    answer.stopped = true;
    return;
  }
  if (error.name !== "ApiFailure") console.error(error);
  answer.failure = explain(error);
  if (error.status === 0 || RETRIED_CODES.has(error.code)) watchServer(showModel);
}

/** Calls at most once a frame: a fast model writes more chunks than a screen can show. */
function frameLimited(work) {
  let isWaiting = false;
  return () => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      work();
    });
  };
}

function stop() {
  runs.get(shown.id)?.controller.abort();
}

/** model: null when it was not told; isKeyWanted: because the key is missing or wrong. */
function showModel(model, isKeyWanted) {
  if (isKeyWanted) toast("This server asks for an API key.", "Enter the key", () => panel.open("set-key"));
  byId("model").textContent = model?.id ?? "";
  byId("model").title = model?.max_model_len ? `Reads ${model.max_model_len.toLocaleString("en-US")} tokens` : "";
}

function makeThemeButton() {
  const other = shownTheme() === "dark" ? "light" : "dark";
  const button = byId("toggle-theme");
  button.replaceChildren(icon(other === "dark" ? "moon" : "sun"));
  button.setAttribute("aria-label", `Use ${other} colors`);
  button.title = `Use ${other} colors`;
}

function listen() {
  byId("toggle-theme").addEventListener("click", () => chooseTheme(shownTheme() === "dark" ? "light" : "dark"));
  addEventListener("themechange", makeThemeButton);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", makeThemeButton);
  byId("open-settings").append(icon("settings"));
  byId("close-settings").append(icon("close"));
  byId("open-settings").addEventListener("click", () => panel.open());
  addEventListener("pagehide", () => runs.forEach(({ conversation }) => saveConversation(conversation)));
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("settings").open || event.defaultPrevented) return;
    if (!sidebar.closeIfNarrow()) stop();
  });
}

function start() {
  byId("examples").append(
    ...EXAMPLES.map((text) => el("button", { type: "button", on: { click: () => composer.fill(text) } }, text)),
  );
  listen();
  makeThemeButton();
  show(shown);
  watchServer(showModel);
  if (matchMedia("(hover: hover)").matches) composer.field.focus(); // not where a keyboard would cover half the screen
}

start();
