// Markdown as it streams in. Blocks that did not change keep their elements, so that a selection in them stays.

import { codeBlock } from "./code.js";
import { parseBlocks } from "./blocks.js";
import { el } from "./dom.js";
import { appendInline } from "./inline.js";

/** Shows a growing text in `root`. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.shown = []; // the source of each block
  }

  /** Show this text in place of the former one. */
  update(text) {
    const lines = text.split(/\r\n|\n|\r/);
    const blocks = parseBlocks(lines);
    blocks.forEach((block, index) => {
      const source = lines.slice(block.first, block.end).join("\n");
      if (this.shown[index] === source) return;
      const element = renderBlock(block);
      if (index < this.root.children.length) this.root.children[index].replaceWith(element);
      else this.root.append(element);
      this.shown[index] = source;
    });
    while (this.root.children.length > blocks.length) this.root.lastElementChild.remove();
    this.shown.length = blocks.length;
  }
}

const RENDERERS = {
  paragraph: (block) => inline("p", block.text),
  heading: (block) => inline(`h${Math.min(6, block.level + 2)}`, block.text), // the page has h1 and h2
  rule: () => el("hr"),
  code: (block) => codeBlock(block.text, block.language),
  math: (block) => el("pre", { class: "math-block", tabindex: "0" }, el("code", {}, block.text)),
  quote: (block) => el("blockquote", {}, ...block.blocks.map(renderBlock)),
  list: renderList,
  table: renderTable,
};

function renderBlock(block) {
  return RENDERERS[block.kind](block);
}

function inline(tag, text, attributes = {}) {
  const element = el(tag, attributes);
  appendInline(element, text);
  return element;
}

function renderList(list) {
  const items = list.items.map((blocks) => el("li", {}, ...itemNodes(blocks, list.isLoose)));
  const start = list.isOrdered && list.start !== 1 ? String(list.start) : null;
  return el(list.isOrdered ? "ol" : "ul", { start }, ...items);
}

function itemNodes(blocks, isLoose) {
  return blocks.flatMap((block) => {
    if (block.kind !== "paragraph") return [renderBlock(block)];
    const task = /^\[([ xX])\]\s+/.exec(block.text);
    const text = task ? block.text.slice(task[0].length) : block.text;
    const box = task ? [task[1] === " " ? "\u2610 " : "\u2611 "] : [];
    const paragraph = inline("p", text);
    paragraph.prepend(...box);
    return isLoose ? [paragraph] : [...paragraph.childNodes];
  });
}

function renderTable(table) {
  const width = table.head.length;
  const cellsOf = (tag, row) =>
    Array.from({ length: width }, (_, column) =>
      inline(tag, row[column] ?? "", { class: table.align[column] ? `align-${table.align[column]}` : null }),
    );
  return el(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, // wide ones scroll by keyboard
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...cellsOf("th", table.head))),
      el("tbody", {}, ...table.rows.map((row) => el("tr", {}, ...cellsOf("td", row)))),
    ),
  );
}
