// Whether the server can answer: asked until it is ready, and again when a request was refused.

import { firstModel, health } from "./api.js";
import { say } from "./announce.js";
import { byId, el } from "./dom.js";

const WAIT_MS = 1000;
const MAX_WAIT_MS = 10_000;

let isWatching = false;

/** Watch until the server is ready. onReady(model, isKeyWanted): its first model, or null when it is not told. */
export async function watchServer(onReady) {
  if (isWatching) return;
  isWatching = true;
  let wait = WAIT_MS;
  for (;;) {
    const state = await health();
    showBanner(state);
    if (state.status === "ready") break;
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = state.status === "loading" ? WAIT_MS : Math.min(MAX_WAIT_MS, wait * 1.5);
  }
  isWatching = false;
  try {
    onReady(await firstModel(), false);
  } catch (error) {
    onReady(null, error.status === 401);
  }
}

const TEXTS = {
  loading: "The model is loading",
  draining: "The server is shutting down",
  failed: "The server could not load its model; its log says why",
  unreachable: "The server cannot be reached; trying again",
};

function showBanner({ status, loaded }) {
  const banner = byId("banner");
  if (status === "ready") {
    if (!banner.hidden) say("The server is ready");
    banner.hidden = true;
    return;
  }
  const text = TEXTS[status] ?? "This does not look like a Harmonium server";
  if (banner.dataset.status !== status || banner.hidden) banner.replaceChildren(el("span", {}, text));
  Object.assign(banner.dataset, { status });
  banner.hidden = false;
  if (status === "loading") showProgress(banner, loaded ?? 0);
}

function showProgress(banner, loaded) {
  let bar = banner.querySelector("progress");
  if (!bar) banner.append((bar = el("progress", { max: "1", "aria-label": "Loading" })), el("span", { class: "percent", "aria-hidden": "true" }));
  bar.value = loaded;
  banner.lastChild.textContent = `${Math.round(loaded * 100)} %`;
}
