// What the user may set, and the panel for it. The API key lives in sessionStorage: it goes when the tab does.

import { byId } from "./dom.js";
import { chooseTheme, themeChoice } from "./theme.js";

const KEY = "harmonium.settings";
const SECRET = "harmonium.key";

const DEFAULTS = { system: "", temperature: null, maxTokens: null, reasoning: "folded", effort: "medium", tools: "" };

/** The settings as they are stored; defaults for what is not. */
export function settings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(KEY) ?? "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}

export function changeSettings(changes) {
  try {
    localStorage.setItem(KEY, JSON.stringify({ ...settings(), ...changes }));
  } catch {
    // storage may be forbidden: the defaults hold
  }
}

export function apiKey() {
  try {
    return sessionStorage.getItem(SECRET) ?? "";
  } catch {
    return "";
  }
}

function setApiKey(key) {
  if (key) sessionStorage.setItem(SECRET, key);
  else sessionStorage.removeItem(SECRET);
}

/** The declared tools as a list; null for none. Throws Error that says what is wrong with the text. */
export function parseTools(text) {
  if (!text.trim()) return null;
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`Tools are not JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("Tools are not a JSON list.");
  return tools.length ? tools : null;
}

/** The panel. onSave is called after a change was saved. */
export function settingsPanel(onSave) {
  const dialog = byId("settings");
  byId("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    try {
      save();
    } catch (error) {
      byId("settings-error").textContent = error.message;
      return;
    }
    dialog.close();
    onSave();
  });
  for (const id of ["close-settings", "cancel-settings"]) byId(id).addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  return {
    /** field: the id of the one to begin with. */
    open(field = "set-system") {
      fill();
      dialog.showModal();
      byId(field).focus();
    },
  };
}

function fill() {
  const now = settings();
  byId("set-key").value = apiKey();
  byId("set-system").value = now.system;
  byId("set-temperature").value = now.temperature ?? "";
  byId("set-max-tokens").value = now.maxTokens ?? "";
  byId("set-reasoning").value = now.reasoning;
  byId("set-theme").value = themeChoice();
  byId("set-tools").value = now.tools;
  byId("settings-error").textContent = "";
}

function save() {
  const changes = {
    system: byId("set-system").value.trim(),
    temperature: numberIn("set-temperature", "Temperature", 0, 2, Number.isFinite),
    maxTokens: numberIn("set-max-tokens", "Most tokens", 1, 10_000_000, Number.isInteger),
    reasoning: byId("set-reasoning").value,
    tools: byId("set-tools").value.trim(),
  };
  parseTools(changes.tools);
  setApiKey(byId("set-key").value.trim());
  changeSettings(changes);
  chooseTheme(byId("set-theme").value);
}

function numberIn(id, name, least, most, isRight) {
  const field = byId(id);
  if (field.value.trim() === "" && !field.validity.badInput) return null;
  const value = Number(field.value);
  if (field.validity.badInput || !isRight(value) || value < least || value > most) {
    field.focus();
    throw new Error(`${name} is no number from ${least} to ${most.toLocaleString("en-US")}.`);
  }
  return value;
}
