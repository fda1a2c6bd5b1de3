// Inline Markdown -> nodes. Written for model output: whatever comes in, every character is shown or is markup,
// nothing is read as HTML, and the time is linear in the text for each of a few levels of nesting.

import { el } from "./dom.js";

const MAX_DEPTH = 6;
const MAX_LABEL = 1000;
const MAX_ADDRESS = 2000;
const SPECIAL = /[\\`*_~[!<h\n]/g;
const ESCAPED = /[!-/:-@[-`{-~]/; // ASCII punctuation
const PROTOCOLS = ["http:", "https:", "mailto:"];
const LINE_BREAK = /<br\s?\/?>/iy;
const AUTO_LINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
const BARE_LINK = /https?:\/\/[^\s<>"`|]{1,2000}/iy;

/** Append the nodes that this text means. */
export function appendInline(parent, text, depth = 0) {
  const scan = { text, parent, depth, plainFrom: 0, at: 0, hopeless: new Set() };
  for (;;) {
    SPECIAL.lastIndex = scan.at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    scan.at = found.index;
    const piece = depth < MAX_DEPTH ? READERS[found[0]](scan) : null;
    if (piece === null) {
      scan.at += 1;
      continue;
    }
    appendPlain(scan, found.index);
    if (piece.node !== null) parent.append(piece.node);
    scan.at = scan.plainFrom = piece.end;
  }
  appendPlain(scan, text.length);
}

function appendPlain({ text, parent, plainFrom }, end) {
  if (end > plainFrom) parent.append(text.slice(plainFrom, end));
}

function match(pattern, { text, at }) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

const READERS = {
  "\\": readEscape,
  "`": readCode,
  "*": readEmphasis,
  _: readEmphasis,
  "~": readEmphasis,
  "[": (scan) => readLink(scan, scan.at),
  "!": (scan) => (scan.text[scan.at + 1] === "[" ? readLink(scan, scan.at + 1) : null),
  "<": readAngle,
  h: readBareLink,
  "\n": (scan) => ({ node: el("br"), end: scan.at + 1 }),
};

function readEscape(scan) {
  const { text, at } = scan;
  const next = text[at + 1];
  if (next === "(" || next === "[") {
    const math = readMath(scan, next === "(" ? "\\)" : "\\]");
    if (math) return math;
  }
  if (next === undefined || !ESCAPED.test(next)) return null;
  return { node: document.createTextNode(next), end: at + 2 };
}

/** Formulas are shown as they are written: a renderer for them would be larger than this page. */
function readMath(scan, close) {
  if (scan.hopeless.has(close)) return null;
  const end = scan.text.indexOf(close, scan.at + 2);
  if (end < 0) {
    scan.hopeless.add(close);
    return null;
  }
  return { node: el("code", { class: "math" }, scan.text.slice(scan.at + 2, end).trim()), end: end + 2 };
}

function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function readCode(scan) {
  const { text, at, hopeless } = scan;
  const length = runLength(text, at);
  const ticks = text.slice(at, at + length);
  for (let end = at + length; !hopeless.has(ticks); ) {
    end = text.indexOf(ticks, end);
    if (end < 0) {
      hopeless.add(ticks);
      break;
    }
    const closing = runLength(text, end);
    if (closing === length) return { node: codeNode(text.slice(at + length, end)), end: end + length };
    end += closing;
  }
  return { node: document.createTextNode(ticks), end: at + length };
}

function codeNode(raw) {
  const text = raw.replaceAll("\n", " ");
  const isPadded = text.length > 2 && text.startsWith(" ") && text.endsWith(" ") && text.trim() !== "";
  return el("code", {}, isPadded ? text.slice(1, -1) : text);
}

const EMPHASIS = { 1: "em", 2: "strong" };

function readEmphasis(scan) {
  const { text, at } = scan;
  const mark = text[at];
  const length = runLength(text, at);
  const after = text[at + length];
  const isInWord = mark === "_" && /\w/.test(text[at - 1] ?? " ");
  const leave = { node: document.createTextNode(text.slice(at, at + length)), end: at + length };
  if (after === undefined || /\s/.test(after) || isInWord || length > 3) return leave;
  for (const size of mark === "~" ? [2] : [3, 2, 1]) {
    const end = size <= length ? closingAt(scan, mark.repeat(size), at + size) : -1;
    if (end >= 0) return { node: emphasized(scan, mark, size, at + size, end), end: end + size };
  }
  return leave;
}

function closingAt({ text, hopeless }, marks, from) {
  if (hopeless.has(marks)) return -1;
  for (let end = text.indexOf(marks, from + 1); end >= 0; end = text.indexOf(marks, end + 1)) {
    if (isClosing(text, marks, end)) return end;
  }
  hopeless.add(marks);
  return -1;
}

function isClosing(text, marks, end) {
  const before = text[end - 1];
  const after = text[end + marks.length];
  if (/\s/.test(before) || before === "\\") return false;
  if (marks[0] === "_" && after !== undefined && /\w/.test(after) && after !== "_") return false;
  // A single mark must not be half of a pair: the pair closes something else.
  return marks.length > 1 || (before !== marks && after !== marks) || text.startsWith(marks.repeat(3), end - 2);
}

function emphasized(scan, mark, size, from, to) {
  const inner = el(mark === "~" ? "s" : size === 3 ? "strong" : EMPHASIS[size]);
  appendInline(inner, scan.text.slice(from, to), scan.depth + 1);
  return size === 3 ? el("em", {}, inner) : inner;
}

/** [label](address "title"); an image becomes a link too, for nothing is loaded from elsewhere. */
function readLink(scan, open) {
  const { text } = scan;
  const close = matching(text, open, "[", "]", MAX_LABEL);
  if (close < 0 || text[close + 1] !== "(") return null;
  const end = matching(text, close + 1, "(", ")", MAX_ADDRESS);
  if (end < 0) return null;
  const address = safeAddress(text.slice(close + 2, end).trim().split(/\s/)[0].replace(/^<|>$/g, ""));
  if (address === null) return null;
  const link = linkTo(address);
  appendInline(link, text.slice(open + 1, close), Math.max(scan.depth + 1, MAX_DEPTH - 2));
  if (!link.textContent) link.append(address);
  return { node: link, end: end + 1 };
}

function matching(text, from, open, close, most) {
  let depth = 0;
  const limit = Math.min(text.length, from + most);
  for (let at = from; at < limit; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === open) depth += 1;
    else if (text[at] === close && --depth === 0) return at;
    else if (text[at] === "\n" && text[at + 1] === "\n") return -1;
  }
  return -1;
}

function readAngle(scan) {
  const lineBreak = match(LINE_BREAK, scan);
  if (lineBreak) return { node: el("br"), end: scan.at + lineBreak[0].length };
  const link = match(AUTO_LINK, scan);
  const address = link && safeAddress(link[1]);
  return address ? { node: linkTo(address, link[1]), end: scan.at + link[0].length } : null;
}

function readBareLink(scan) {
  if (/\w/.test(scan.text[scan.at - 1] ?? " ")) return null;
  const found = match(BARE_LINK, scan);
  if (!found) return null;
  let written = found[0].replace(/[.,;:!?'*_~\]]+$/, "");
  if (written.endsWith(")") && !written.includes("(")) written = written.slice(0, -1);
  const address = safeAddress(written);
  return address ? { node: linkTo(address, written), end: scan.at + written.length } : null;
}

/** The address if a reader may be sent there, else null: no javascript:, no data:, nothing relative. */
export function safeAddress(written) {
  try {
    const url = new URL(written);
    return PROTOCOLS.includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function linkTo(address, text = "") {
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address }, text);
}
