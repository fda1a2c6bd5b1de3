// A block of code: its language, a button that copies it, and quiet colors for what most languages share.

import { el, icon } from "./dom.js";

const MAX_COLORED_CHARS = 40_000;
const HASH_LANGUAGES = /^(py|python|sh|bash|shell|zsh|console|yaml|yml|toml|ruby|rb|perl|r|make|makefile|dockerfile|ini|conf|elixir|julia|nim)$/i;
const DASH_LANGUAGES = /^(sql|lua|haskell|hs|ada|elm)$/i;
const PLAIN_LANGUAGES = /^(|text|txt|plain|plaintext|markdown|md|output|log|diff|csv)$/i;

const KEYWORDS = new Set(
  (
    "and as assert async await begin break case catch class const continue def default defer del do elif else end " +
    "enum except export extends false False final finally fn for foreach from func function global go goto if impl " +
    "implements import in include instanceof interface is lambda let loop match mod module mut namespace new nil " +
    "None nonlocal not null of or package pass private protected pub public raise return self static struct super " +
    "switch template then this throw trait true True try type typedef typeof union unless until use using var void " +
    "when where while with yield SELECT FROM WHERE INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE JOIN LEFT " +
    "RIGHT INNER OUTER ON GROUP BY ORDER LIMIT AS AND OR NOT NULL PRIMARY KEY HAVING DISTINCT UNION int float " +
    "double char bool boolean string str unsigned signed long short echo fi done esac local"
  ).split(" "),
);

/** The element for this code. */
export function codeBlock(text, language) {
  const code = el("code");
  color(code, text, language);
  const copy = el("button", { type: "button", class: "copy-code", on: { click: () => copyText(text, copy) } }, icon("copy"), "Copy");
  return el(
    "figure",
    { class: "code" },
    el("figcaption", {}, el("span", {}, language || "text"), copy),
    el("pre", { tabindex: "0" }, code), // long lines scroll by keyboard
  );
}

/** Copies, and says so on the button for a moment. */
export async function copyText(text, button) {
  const label = button.lastChild;
  const before = label.textContent;
  label.textContent = (await wasCopied(text)) ? "Copied" : "Not copied";
  setTimeout(() => (label.textContent = before), 1500);
}

async function wasCopied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedBySelection(text); // pages that came over plain HTTP have no clipboard
  }
}

function copiedBySelection(text) {
  const field = el("textarea", { class: "unseen", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const isDone = document.execCommand("copy");
  field.remove();
  return isDone;
}

function color(parent, text, language) {
  if (PLAIN_LANGUAGES.test(language) || text.length > MAX_COLORED_CHARS) {
    parent.append(text);
    return;
  }
  let plainFrom = 0;
  for (const found of text.matchAll(tokens(language))) {
    const kind = kindOf(found.groups);
    if (kind === null) continue;
    parent.append(text.slice(plainFrom, found.index), el("span", { class: `t-${kind}` }, found[0]));
    plainFrom = found.index + found[0].length;
  }
  parent.append(text.slice(plainFrom));
}

/** What is colored. Each alternative ends at a line's or the text's end at the latest: no backtracking. */
function tokens(language) {
  let comment = "\\/\\/[^\\n]*|\\/\\*[\\s\\S]*?(?:\\*\\/|$)|<!--[\\s\\S]*?(?:-->|$)";
  if (HASH_LANGUAGES.test(language)) comment = "#[^\\n]*";
  if (DASH_LANGUAGES.test(language)) comment = "--[^\\n]*";
  const string = "\"\"\"[\\s\\S]*?(?:\"\"\"|$)|'''[\\s\\S]*?(?:'''|$)|\"(?:\\\\.|[^\"\\\\\\n])*\"?|'(?:\\\\.|[^'\\\\\\n])*'|`(?:\\\\.|[^`\\\\])*`?";
  return new RegExp(`(?<comment>${comment})|(?<string>${string})|(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_]\\w*)(?<call>\\()?`, "g");
}

function kindOf(groups) {
  if (groups.word !== undefined) return KEYWORDS.has(groups.word) && groups.call === undefined ? "keyword" : null;
  return ["comment", "string", "number"].find((kind) => groups[kind] !== undefined) ?? null;
}
