// Calls of tools, and the field in which the reader answers them.

import { el, icon } from "./dom.js";

/** The cards of one answer. answerCall(call, text) is called when the reader gives a result. */
export class CallCards {
  constructor(answerCall) {
    this.answerCall = answerCall;
    this.element = el("div", { class: "calls" });
    this.shown = [];
  }

  /** A card is made anew only when something in it changed: a result that is being typed stays. */
  update(calls, { isRunning, isLast, results }) {
    calls.forEach((call, index) => {
      const result = results.get(call.id) ?? null;
      const state = result !== null ? "answered" : isRunning ? "writing" : isLast ? "open" : "unanswered";
      const signature = JSON.stringify([call, state, result]);
      if (this.shown[index] === signature) return;
      const card = this.card(call, state, result);
      if (this.shown[index] === undefined) this.element.append(card);
      else this.element.children[index].replaceWith(card);
      this.shown[index] = signature;
    });
  }

  card(call, state, result) {
    const head = el("div", { class: "call-head" }, icon("tool"), el("strong", {}, call.name || "tool"), el("span", { class: "call-state" }, STATES[state]));
    const card = el("section", { class: `call ${state}`, "aria-label": `Call of the tool ${call.name}` }, head);
    card.append(el("pre", { class: "arguments", tabindex: "0", "aria-label": "Arguments" }, el("code", {}, pretty(call.text))));
    if (state === "answered") card.append(el("p", { class: "call-label" }, "Result"), el("pre", { tabindex: "0" }, el("code", {}, pretty(result))));
    if (state === "open") card.append(this.form(call));
    return card;
  }

  form(call) {
    const field = el("textarea", { rows: "2", "aria-label": `Result of ${call.name}`, placeholder: "The tool's result, as text or JSON" });
    const submit = (event) => {
      event.preventDefault();
      this.answerCall(call, field.value);
    };
    const onKey = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
    };
    field.addEventListener("keydown", onKey);
    return el("form", { class: "result-form", on: { submit } }, field, el("button", { type: "submit", class: "quiet" }, "Send result"));
  }
}

const STATES = { writing: "is being written", open: "waits for a result", answered: "answered", unanswered: "not answered" };

/** JSON with line breaks; other text as it is. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
