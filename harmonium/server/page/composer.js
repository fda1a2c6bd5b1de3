// The field for messages: Enter sends, Shift+Enter breaks the line, and one button that sends or stops.

import { byId, icon } from "./dom.js";
import { changeSettings, settings } from "./settings.js";

const MAX_HEIGHT_PX = 260;

/** send(text) and stop() are called for the user. */
export class Composer {
  constructor({ send, stop }) {
    Object.assign(this, { send, stop, isRunning: false });
    this.field = byId("prompt");
    this.button = byId("send");
    this.field.addEventListener("input", () => this.adapt());
    this.field.addEventListener("keydown", (event) => this.onKey(event));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.makeEffort();
    this.setRunning(false);
  }

  makeEffort() {
    const chosen = settings().effort;
    for (const radio of byId("effort").querySelectorAll("input")) {
      radio.checked = radio.value === chosen;
      radio.addEventListener("change", () => changeSettings({ effort: radio.value }));
    }
  }

  onKey(event) {
    // While an input method composes, Enter chooses a word.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.isRunning) this.submit();
  }

  submit() {
    if (this.isRunning) {
      this.stop();
      return;
    }
    const text = this.field.value.trim();
    if (!text) return;
    this.fill("");
    this.send(text);
  }

  /** Put a text into the field. */
  fill(text) {
    this.field.value = text;
    this.adapt();
    this.field.focus();
  }

  setRunning(isRunning) {
    this.isRunning = isRunning;
    const label = isRunning ? "Stop the answer" : "Send the message";
    this.button.replaceChildren(icon(isRunning ? "stop" : "send"));
    this.button.setAttribute("aria-label", label);
    this.button.title = label;
    this.button.classList.toggle("stops", isRunning);
    this.adapt();
  }

  adapt() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(MAX_HEIGHT_PX, this.field.scrollHeight)}px`;
    this.button.disabled = !this.isRunning && !this.field.value.trim();
  }
}
