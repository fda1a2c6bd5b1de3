// Markdown -> blocks: {kind, first, end, ...} with the lines first..end-1 that each is made of.

const MAX_DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+(.*))?$/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const MATH_OPEN = /^\s*\\\[/;
const MAX_MARK_CHARS = 2000; // fences and rules of tables are shorter; longer lines would cost their patterns dear

const isBlank = (line) => line.trim() === "";
const isFence = (line) => line.length < MAX_MARK_CHARS && FENCE.test(line);
const indentOf = (line) => line.length - line.trimStart().length;

/** The blocks of these lines. */
export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const block = readBlock(lines, at, depth);
    blocks.push({ ...block, first: at });
    at = block.end;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const isNested = depth < MAX_DEPTH;
  if (isFence(line)) return readFence(lines, at);
  if (HEADING.test(line)) return readHeading(line, at);
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (QUOTE.test(line) && isNested) return readQuote(lines, at, depth);
  if (ITEM.test(line) && isNested) return readList(lines, at, depth);
  if (MATH_OPEN.test(line)) return readMath(lines, at);
  if (isTableAt(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at);
}

function readFence(lines, at) {
  const [, marks, info] = FENCE.exec(lines[at]);
  const indent = indentOf(lines[at]);
  const isClosing = (line) => line.trim().startsWith(marks) && line.trim().split(marks[0]).join("") === "";
  let end = at + 1;
  while (end < lines.length && !isClosing(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  const isClosed = end < lines.length;
  return { kind: "code", language: info.trim().split(/\s/)[0], text: code.join("\n"), isClosed, end: end + (isClosed ? 1 : 0) };
}

function readHeading(line, at) {
  const [, marks, text] = HEADING.exec(line);
  const title = (text ?? "").trim().replace(/(^|\s)#{1,6}$/, "");
  return { kind: "heading", level: marks.length, text: title.trim(), end: at + 1 };
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && !isBlank(lines[end]) && (QUOTE.test(lines[end]) || !startsBlock(lines, end))) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { kind: "quote", blocks: parseBlocks(inner, depth + 1), end };
}

function readMath(lines, at) {
  let end = at;
  while (end < lines.length && !lines[end].includes("\\]") && !isBlank(lines[end])) end += 1;
  if (end < lines.length && lines[end].includes("\\]")) end += 1;
  const text = lines.slice(at, end).join("\n").trim().replace(/^\\\[/, "").replace(/\\\]$/, "");
  return { kind: "math", text: text.trim(), end };
}

/** Whether this line ends a paragraph. */
function startsBlock(lines, at) {
  const line = lines[at];
  const isStart = isFence(line) || [HEADING, RULE, QUOTE, MATH_OPEN].some((start) => start.test(line));
  return isStart || isInterruptingItem(line);
}

/** A numbered item other than 1 is more likely a line of the paragraph that begins with a year. */
function isInterruptingItem(line) {
  const found = ITEM.exec(line);
  return found !== null && Boolean(found[3]) && (!/^\d/.test(found[2]) || /^1[.)]/.test(found[2]));
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines, end) && !isTableAt(lines, end)) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n"), end };
}

function readList(lines, at, depth) {
  const base = indentOf(lines[at]);
  const isOrdered = /\d/.test(ITEM.exec(lines[at])[2]);
  const list = { kind: "list", isOrdered, start: parseInt(ITEM.exec(lines[at])[2], 10) || 1, items: [], isLoose: false };
  let end = at;
  while (end < lines.length && isItemOf(lines[end], base, isOrdered)) {
    const item = readItem(lines, end, base);
    const next = skipBlank(lines, item.end);
    list.isLoose ||= item.hasBlank || (next > item.end && next < lines.length && isItemOf(lines[next], base, isOrdered));
    list.items.push(parseBlocks(item.lines, depth + 1));
    end = item.end;
    if (next < lines.length && isItemOf(lines[next], base, isOrdered)) end = next;
  }
  return { ...list, end };
}

function isItemOf(line, base, isOrdered) {
  const found = ITEM.exec(line);
  return found !== null && !RULE.test(line) && indentOf(line) <= base + 1 && /\d/.test(found[2]) === isOrdered;
}

function skipBlank(lines, at) {
  while (at < lines.length && isBlank(lines[at])) at += 1;
  return at;
}

/** The lines of one item, without its marker and indent. */
function readItem(lines, at, base) {
  const [, space, marker, text = ""] = ITEM.exec(lines[at]);
  const inner = space.length + marker.length + 1;
  const found = { lines: [text], end: at + 1, hasBlank: false };
  while (found.end < lines.length) {
    const next = skipBlank(lines, found.end);
    if (next === lines.length || !belongs(lines, next, base, next > found.end)) break;
    for (; found.end < next; found.end += 1) found.lines.push("");
    found.hasBlank ||= found.lines.at(-1) === "" && found.lines.length > 1 && indentOf(lines[next]) <= inner + 1;
    found.lines.push(lines[next].slice(Math.min(inner, indentOf(lines[next]))));
    found.end = next + 1;
  }
  return found;
}

/** Models indent by two to four blanks, whatever the marker's width: more than the marker is enough. */
function belongs(lines, at, base, isAfterBlank) {
  if (indentOf(lines[at]) >= base + 2) return true;
  return !isAfterBlank && !ITEM.test(lines[at]) && !startsBlock(lines, at);
}

function isTableAt(lines, at) {
  const next = lines[at + 1];
  if (next === undefined || !lines[at].includes("|") || !next.includes("|")) return false;
  return next.length < MAX_MARK_CHARS && TABLE_RULE.test(next);
}

function readTable(lines, at) {
  const align = cells(lines[at + 1]).map(alignment);
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !isBlank(lines[end])) end += 1;
  const rows = lines.slice(at + 2, end).map(cells);
  return { kind: "table", head: cells(lines[at]), align, rows, end };
}

function alignment(cell) {
  if (!cell.endsWith(":")) return null;
  return cell.startsWith(":") ? "center" : "end";
}

/** The cells of a row: bars in code and escaped ones do not part them. */
function cells(line) {
  const found = [""];
  let isCode = false;
  const row = line.trim().replace(/^\|/, "");
  for (let at = 0; at < row.length; at += 1) {
    if (row[at] === "\\" && row[at + 1] === "|") found[found.length - 1] += row[(at += 1)];
    else if (row[at] === "|" && !isCode) found.push("");
    else {
      if (row[at] === "`") isCode = !isCode;
      found[found.length - 1] += row[at];
    }
  }
  if (found.at(-1).trim() === "" && found.length > 1) found.pop();
  return found.map((cell) => cell.trim());
}
