// What a screen reader says while an answer streams: whole sentences, not letters, and never the same twice.

import { byId, el } from "./dom.js";

const MAX_KEPT = 20;
const SENTENCE_END = /[.!?:]["')\]]*\s|\n/g;

/** Say this text when the reader has time. */
export function say(text) {
  const region = byId("spoken");
  region.append(el("p", {}, text));
  while (region.children.length > MAX_KEPT) region.firstElementChild.remove();
}

/** Says a growing text by sentences. */
export class SentenceSpeaker {
  constructor() {
    this.said = 0; // characters
  }

  /** text: all of it so far. */
  update(text) {
    SENTENCE_END.lastIndex = this.said;
    let end = this.said;
    for (let found; (found = SENTENCE_END.exec(text)); ) end = found.index + found[0].length;
    this.sayUpTo(text, end);
  }

  /** The answer is over: say what is left. */
  finish(text) {
    this.sayUpTo(text, text.length);
  }

  sayUpTo(text, end) {
    const part = text.slice(this.said, end).replace(/[`*_#|]+/g, " ").trim();
    this.said = end;
    if (part) say(part);
  }
}
