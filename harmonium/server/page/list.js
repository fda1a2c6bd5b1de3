// The messages of the conversation that is shown, and the scrolling that follows an answer as it grows.

import { AnswerView } from "./answer.js";
import { byId, el, icon, prefersStillness } from "./dom.js";

const NEAR_END_PX = 90;

export class MessageList {
  constructor(actions) {
    this.actions = actions;
    this.views = new Map();
    this.element = byId("messages");
    this.scroller = byId("scroller");
    this.isFollowing = true;
    this.makeToEnd();
  }

  makeToEnd() {
    this.toEnd = byId("to-end");
    this.toEnd.append(icon("down"), el("span", { class: "unseen" }, "To the latest message"));
    this.toEnd.addEventListener("click", () => this.follow());
    this.scroller.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.scroller;
      this.isFollowing = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
      this.toEnd.hidden = this.isFollowing;
    }, { passive: true });
  }

  /** Show this conversation. running: the answer that is being written, or null. */
  show(conversation, running) {
    this.views.clear();
    this.element.replaceChildren();
    byId("welcome").hidden = conversation.messages.length > 0;
    for (const message of conversation.messages) this.add(message);
    this.refresh(conversation, running);
    this.follow(false);
  }

  add(message) {
    byId("welcome").hidden = true;
    if (message.role === "tool") return; // its call shows it
    if (message.role === "user") {
      this.element.append(el("li", { class: "message user" }, el("h3", { class: "unseen" }, "You"), el("div", { class: "bubble" }, message.content)));
      return;
    }
    const view = new AnswerView(message, this.actions);
    this.views.set(message, view);
    this.element.append(view.element);
  }

  /** Bring every answer up to date: which is the last, which calls have results. */
  refresh(conversation, running) {
    for (const answer of this.views.keys()) this.update(conversation, answer, running);
  }

  /** Bring one answer up to date. */
  update(conversation, answer, running) {
    const { messages } = conversation;
    const results = new Map(messages.filter(({ role }) => role === "tool").map(({ callId, content }) => [callId, content]));
    this.views.get(answer)?.update({ isRunning: answer === running, isLast: answer === lastAnswer(messages), results });
    if (this.isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** Go to the end and stay there. */
  follow(isSmooth = true) {
    this.isFollowing = true;
    this.toEnd.hidden = true;
    const behavior = isSmooth && !prefersStillness() ? "smooth" : "instant";
    this.scroller.scrollTo({ top: this.scroller.scrollHeight, behavior });
  }
}

/** The answer that nothing of the user follows: it can be tried again, its calls can be answered. */
function lastAnswer(messages) {
  const last = messages.findLast(({ role }) => role !== "tool");
  return last?.role === "assistant" ? last : null;
}
