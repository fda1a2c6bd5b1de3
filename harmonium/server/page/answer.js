// The view of one answer: reasoning folded, the text, calls, what went wrong, and figures below.

import { SentenceSpeaker, say } from "./announce.js";
import { CallCards } from "./calls.js";
import { copyText } from "./code.js";
import { count, el, icon } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { settings } from "./settings.js";
import { tokensPerSecond } from "./turn.js";

/** actions: {retry(), openKey(), newChat(), answerCall(call, text)}. */
export class AnswerView {
  constructor(answer, actions) {
    this.answer = answer;
    this.actions = actions;
    this.speaker = new SentenceSpeaker();
    this.isRunning = false;
    this.body = el("div", { class: "content" });
    this.markdown = new MarkdownView(this.body);
    this.cards = new CallCards(actions.answerCall);
    this.notes = el("div", { class: "notes" });
    this.foot = el("div", { class: "answer-foot" });
    this.makeReasoning();
    this.waiting = el("p", { class: "waiting" }, el("span", { class: "dots" }, el("i"), el("i"), el("i")), el("span", { class: "unseen" }, "The model is reading"));
    this.element = el(
      "li",
      { class: "message answer" },
      el("h3", { class: "unseen" }, "Answer"),
      this.waiting,
      this.reasoning,
      this.body,
      this.cards.element,
      this.notes,
      this.foot,
    );
  }

  makeReasoning() {
    this.reasoningLabel = el("span", { class: "reasoning-label" });
    this.reasoningCount = el("span", { class: "reasoning-count" });
    this.reasoningBody = el("div", { class: "reasoning-text" });
    this.reasoningMarkdown = new MarkdownView(this.reasoningBody);
    const summary = el("summary", {}, icon("think"), this.reasoningLabel, this.reasoningCount, el("span", { class: "chevron", "aria-hidden": "true" }));
    this.reasoning = el("details", { class: "reasoning", on: { toggle: () => this.updateReasoning() } }, summary, this.reasoningBody);
    this.reasoning.open = settings().reasoning === "open";
  }

  /** Show the answer as it is now. facts: {isRunning, isLast, results}: results of calls by their id. */
  update({ isRunning, isLast, results }) {
    const { answer } = this;
    if (this.isRunning && !isRunning) this.sayEnd();
    this.isRunning = isRunning;
    this.updateReasoning();
    this.markdown.update(answer.content);
    this.body.hidden = !answer.content;
    this.cards.update(answer.toolCalls, { isRunning, isLast, results });
    this.waiting.hidden = !isRunning || Boolean(answer.reasoning || answer.content || answer.toolCalls.length);
    this.element.classList.toggle("running", isRunning);
    if (isRunning) this.speaker.update(answer.content);
    this.updateNotes(isRunning, isLast);
    this.updateFoot(isRunning, isLast);
  }

  updateReasoning() {
    const { answer, isRunning } = this;
    this.reasoning.hidden = !answer.reasoning || settings().reasoning === "hidden";
    if (this.reasoning.hidden) return;
    const isThinking = isRunning && !answer.content && !answer.toolCalls.length;
    this.reasoning.classList.toggle("thinking", isThinking);
    const seconds = answer.reasoningSeconds;
    this.reasoningLabel.textContent = isThinking ? "Thinking" : seconds >= 1 ? `Thought for ${Math.round(seconds)} s` : "Thought";
    const tokens = answer.usage?.reasoning;
    this.reasoningCount.textContent = tokens ? `${count(tokens)} token${tokens === 1 ? "" : "s"}` : "";
    if (this.reasoning.open) this.reasoningMarkdown.update(answer.reasoning);
  }

  updateNotes(isRunning, isLast) {
    const notes = isRunning ? [] : [...this.remarks(), this.failureNote(isLast)];
    this.notes.replaceChildren(...notes.filter((note) => note !== null));
  }

  remarks() {
    const { finish, stopped, failure, diagnostics } = this.answer;
    const found = diagnostics.map(({ code, text }) => `The model wrote something that has no place here (${code}): ${text}`);
    if (stopped) found.push("Stopped.");
    else if (finish === "length") found.push("Cut off: the answer reached the most tokens it may have.");
    else if (!finish && !failure) found.push("Cut off: the page was left before the answer was whole.");
    return found.map((text) => el("p", { class: "remark" }, text));
  }

  failureNote(isLast) {
    const { failure } = this.answer;
    if (!failure) return null;
    const buttons = {
      key: ["Enter the key", this.actions.openKey],
      new: ["New chat", this.actions.newChat],
      retry: ["Try again", this.actions.retry],
    };
    const [label, act] = buttons[failure.action] ?? [];
    const button = label && isLast ? el("button", { type: "button", class: "quiet", on: { click: act } }, label) : null;
    return el("div", { class: "failure", role: "alert" }, el("p", {}, failure.text), button);
  }

  updateFoot(isRunning, isLast) {
    const figures = this.figures();
    if (isRunning) {
      this.foot.replaceChildren(el("span", { class: "figures" }, figures));
      return;
    }
    const { content } = this.answer;
    const copy = el("button", { type: "button", class: "foot-button", on: { click: () => copyText(content, copy) } }, icon("copy"), "Copy");
    const retry = el("button", { type: "button", class: "foot-button", on: { click: this.actions.retry } }, icon("retry"), "Try again");
    this.foot.replaceChildren(...(content ? [copy] : []), ...(isLast ? [retry] : []), el("span", { class: "figures" }, figures));
  }

  figures() {
    const { usage, firstSeconds } = this.answer;
    if (!usage?.completion) return "";
    const speed = tokensPerSecond(this.answer);
    const parts = [`${count(usage.completion)} token${usage.completion === 1 ? "" : "s"}`];
    if (speed !== null) parts.push(`${speed < 100 ? speed.toFixed(1) : count(Math.round(speed))} tokens/s`);
    if (firstSeconds >= 0.05) parts.push(`first after ${firstSeconds.toFixed(firstSeconds < 10 ? 1 : 0)} s`);
    return parts.join(" \u00b7 ");
  }

  sayEnd() {
    this.speaker.finish(this.answer.content);
    if (!this.answer.failure) say(this.answer.stopped ? "Stopped" : "The answer is complete");
  }
}
