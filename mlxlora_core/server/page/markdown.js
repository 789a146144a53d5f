/**
 * Markdown as elements. What a model says is not trusted: this makes a fixed set of elements, with text in
 * them, links to http and https only, and nothing that is fetched. HTML is text.
 *
 * A line is {text, at}: characters of the source from an offset on. `leaf(text, at)` makes the nodes of a
 * piece of text, so that its caller knows where in the source each piece stands.
 */
import { element } from "./elements.js";

const DEEPEST = 8; // lists and quotes in each other, and emphasis; deeper ones are text
const LONGEST_LINK = 2000; // characters
const FENCE = /^ {0,3}(`{3,}(?!.*`)|~{3,})\s*([\w+#.-]{0,30})/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const DELIMITERS = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;

/**
 * The blocks of a text: {start, end, build}, where build() makes the element of source[start:end].
 * @param {string} source
 * @param {(text: string, at: number) => Node} leaf
 */
export function blocks(source, leaf) {
  let at = 0;
  const lines = source.split("\n").map((text) => {
    const line = { text, at };
    at += text.length + 1;
    return line;
  });
  return parse(lines, leaf, 0);
}

const cut = (line, count) => ({ text: line.text.slice(count), at: line.at + Math.min(count, line.text.length) });
const isBlank = (line) => line.text.trim() === "";
const whole = (lines) => ({ start: lines[0].at, end: lines.at(-1).at + lines.at(-1).text.length });

function parse(lines, leaf, depth) {
  const found = [];
  for (let i = 0; i < lines.length; ) {
    if (isBlank(lines[i])) {
      i++;
      continue;
    }
    const [taken, build] = block(lines, i, leaf, depth);
    found.push({ ...whole(lines.slice(i, i + taken)), build });
    i += taken;
  }
  return found;
}

/** How many lines the block that begins at line i has, and what builds it. */
function block(lines, i, leaf, depth) {
  const { text } = lines[i];
  const fence = FENCE.exec(text);
  if (fence) return code(lines, i, fence, leaf);
  const heading = HEADING.exec(text);
  if (heading) {
    const line = cut(lines[i], heading[0].length);
    const level = Math.min(6, heading[1].length + 3); // below those of the page
    return [1, () => element(`h${level}`, {}, inline([{ ...line, text: line.text.replace(/\s+#+\s*$/, "") }], leaf))];
  }
  if (RULE.test(text)) return [1, () => element("hr")];
  if (depth < DEEPEST && QUOTE.test(text)) return quote(lines, i, leaf, depth);
  if (depth < DEEPEST && ITEM.test(text)) return list(lines, i, leaf, depth);
  if (isTable(lines, i)) return table(lines, i, leaf);
  return paragraph(lines, i, leaf, depth);
}

function code(lines, i, fence, leaf) {
  const end = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
  let to = i + 1;
  while (to < lines.length && !end.test(lines[to].text)) to++;
  const body = lines.slice(i + 1, to);
  const build = () => {
    const text = body.flatMap((line, k) => (k ? [leaf("\n", line.at - 1), leaf(line.text, line.at)] : [leaf(line.text, line.at)]));
    const name = fence[2] ? element("span", { class: "language" }, fence[2]) : null;
    return element("div", { class: "code" }, name, element("pre", { tabindex: "0", role: "region", "aria-label": "Code" }, element("code", {}, ...text)));
  };
  return [Math.min(to + 1, lines.length) - i, build];
}

function quote(lines, i, leaf, depth) {
  let to = i;
  while (to < lines.length && QUOTE.test(lines[to].text)) to++;
  const inner = lines.slice(i, to).map((line) => cut(line, QUOTE.exec(line.text)[0].length));
  return [to - i, () => element("blockquote", {}, ...parse(inner, leaf, depth + 1).map((part) => part.build()))];
}

function list(lines, i, leaf, depth) {
  const [, indent, mark] = ITEM.exec(lines[i].text);
  const ordered = /\d/.test(mark);
  const items = [];
  let to = i;
  let deep = 0; // characters that what belongs to the item is moved in by
  for (; to < lines.length; to++) {
    const found = ITEM.exec(lines[to].text);
    const spaces = /^ */.exec(lines[to].text)[0].length;
    if (found && found[1].length <= indent.length + 1 && /\d/.test(found[2]) === ordered && !RULE.test(lines[to].text)) {
      deep = found[0].length;
      items.push([cut(lines[to], deep)]);
    } else if (isBlank(lines[to])) {
      const next = lines[to + 1];
      if (!next || isBlank(next) || !(ITEM.test(next.text) || next.text.startsWith(" ".repeat(Math.min(deep, 2))))) break;
      items.at(-1).push(cut(lines[to], spaces));
    } else if (spaces >= Math.min(deep, 2) || (!found && !startsBlock(lines[to].text) && !isBlank(lines[to - 1]))) {
      items.at(-1).push(cut(lines[to], Math.min(spaces, deep)));
    } else break;
  }
  const build = () => {
    const start = ordered && Number.parseInt(mark, 10) !== 1 ? Number.parseInt(mark, 10) : null;
    return element(ordered ? "ol" : "ul", { start }, ...items.map((item) => element("li", {}, ...content(item, leaf, depth + 1))));
  };
  return [to - i, build];
}

/** What is in an item: a single paragraph needs no element of its own. */
function content(lines, leaf, depth) {
  const parts = parse(lines, leaf, depth).map((part) => part.build());
  return parts.flatMap((part, i) => (i === 0 && part.localName === "p" ? [...part.childNodes] : [part]));
}

const startsBlock = (text) => [FENCE, HEADING, RULE, QUOTE].some((form) => form.test(text));

function paragraph(lines, i, leaf, depth) {
  let to = i + 1;
  while (to < lines.length && !isBlank(lines[to]) && !startsBlock(lines[to].text)) {
    if ((depth < DEEPEST && ITEM.test(lines[to].text)) || isTable(lines, to)) break;
    to++;
  }
  const [first, ...rest] = lines.slice(i, to);
  const indent = first.text.length - first.text.trimStart().length;
  return [to - i, () => element("p", {}, inline([cut(first, indent), ...rest], leaf))];
}

// --- tables -------------------------------------------------------------------

function isTable(lines, i) {
  const next = lines[i + 1]?.text ?? "";
  return lines[i].text.includes("|") && next.includes("-") && next.includes("|") && DELIMITERS.test(next)
    && cells(lines[i]).length === cells(lines[i + 1]).length;
}

function cells(line) {
  const found = [];
  let from = /^ *\|?/.exec(line.text)[0].length;
  const end = line.text.replace(/\|? *$/, "").length;
  for (let at = from; at <= end; at++) {
    if (at < end && (line.text[at] !== "|" || line.text[at - 1] === "\\")) continue;
    const lead = /^ */.exec(line.text.slice(from, at))[0].length;
    found.push({ text: line.text.slice(from + lead, at).trimEnd(), at: line.at + from + lead });
    from = at + 1;
  }
  return found;
}

function table(lines, i, leaf) {
  let to = i + 2;
  while (to < lines.length && !isBlank(lines[to]) && lines[to].text.includes("|")) to++;
  const row = (line, name) => element("tr", {}, ...cells(line).map((cell) => element(name, {}, inline([cell], leaf))));
  const build = () => element(
    "div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" },
    element("table", {}, element("thead", {}, row(lines[i], "th")), element("tbody", {}, ...lines.slice(i + 2, to).map((line) => row(line, "td")))),
  );
  return [to - i, build];
}

// --- within a line ------------------------------------------------------------

/** The nodes of some lines, which stay lines. */
function inline(lines, leaf) {
  const made = document.createDocumentFragment();
  const text = lines.map((line) => line.text).join("\n");
  const offsets = []; // where in the source each character stands
  for (const line of lines) {
    for (let k = 0; k <= line.text.length; k++) offsets.push(line.at + k);
  }
  new Inline(text, offsets, leaf).into(made, 0, text.length, 0);
  return made;
}

class Inline {
  constructor(text, offsets, leaf) {
    Object.assign(this, { text, offsets, leaf });
  }

  /** Append what text[from:to] is. */
  into(place, from, to, depth) {
    const missing = new Set(); // closers that do not come any more: each is looked for once
    let plain = from;
    const flush = (end) => {
      for (let a = plain; a < end; ) {
        let b = a + 1;
        while (b < end && this.offsets[b] === this.offsets[b - 1] + 1) b++;
        place.append(this.leaf(this.text.slice(a, b), this.offsets[a]));
        a = b;
      }
    };
    for (let i = from; i < to; ) {
      const found = this.mark(i, to, depth, missing);
      if (!found) {
        i++;
        continue;
      }
      flush(i);
      if (found.node) place.append(found.node);
      i = found.end;
      plain = found.end - (found.keep ?? 0);
    }
    flush(to);
  }

  /** What begins at i: {node, end}, or {end, keep} for an escaped character, or nothing. */
  mark(i, to, depth, missing) {
    const character = this.text[i];
    if (character === "\\") return /[!-/:-@[-`{-~]/.test(this.text[i + 1] ?? "") && i + 1 < to ? { end: i + 2, keep: 1 } : null;
    if (character === "`") return this.code(i, to, missing);
    if (depth >= DEEPEST) return null;
    if (character === "[") return this.link(i, to, depth);
    if (character === "!" && this.text[i + 1] === "[") return this.link(i + 1, to, depth);
    if (character === "<") return this.address(i, to);
    return "*_~".includes(character) ? this.emphasis(i, to, depth, missing) : null;
  }

  code(i, to, missing) {
    const fence = /^`+/.exec(this.text.slice(i, Math.min(to, i + 50)))[0];
    const from = i + fence.length;
    const end = missing.has(fence) ? -1 : this.closing(fence, from, to);
    if (end < 0) {
      missing.add(fence);
      return { end: from, keep: fence.length };
    }
    const made = element("code");
    const padded = this.text[from] === " " && this.text[end - 1] === " " && end - from > 2 ? 1 : 0;
    this.plainInto(made, from + padded, end - padded);
    return { node: made, end: end + fence.length };
  }

  /** Where a run of backticks of exactly this length stands. */
  closing(fence, from, to) {
    for (let at = from; ; ) {
      at = this.text.indexOf(fence, at);
      if (at < 0 || at + fence.length > to) return -1;
      let end = at + fence.length;
      while (this.text[end] === "`") end++;
      if (end - at === fence.length && this.text[at - 1] !== "`") return at;
      at = end;
    }
  }

  plainInto(place, from, to) {
    for (let a = from; a < to; ) {
      let b = a + 1;
      while (b < to && this.offsets[b] === this.offsets[b - 1] + 1) b++;
      place.append(this.leaf(this.text.slice(a, b), this.offsets[a]));
      a = b;
    }
  }

  emphasis(i, to, depth, missing) {
    const character = this.text[i];
    const double = this.text[i + 1] === character;
    if (character === "~" && !double) return null;
    const mark = double ? character + character : character;
    const from = i + mark.length;
    const before = this.text[i - 1] ?? " ";
    if (missing.has(mark) || from >= to || /\s/.test(this.text[from])) return null;
    if (character === "_" && /[\p{L}\p{N}_]/u.test(before)) return null;
    const end = this.end(mark, from + 1, to);
    if (end < 0) {
      missing.add(mark);
      return { end: from, keep: mark.length };
    }
    const made = element({ "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" }[mark]);
    this.into(made, from, end, depth + 1);
    return { node: made, end: end + mark.length };
  }

  /** Where emphasis ends. */
  end(mark, from, to) {
    const character = mark[0];
    for (let at = from; ; at++) {
      at = this.text.indexOf(mark, at);
      if (at < 0 || at + mark.length > to) return -1;
      let run = 1;
      while (this.text[at + run] === character) run++;
      const after = this.text[at + run] ?? " ";
      const fits = mark.length === 1 ? run !== 2 : run >= 2;
      if (fits && !/[\s\\]/.test(this.text[at - 1]) && !(character === "_" && /[\p{L}\p{N}]/u.test(after))) {
        return at + run - mark.length > to - mark.length ? at : at + run - mark.length;
      }
      at += run - 1;
    }
  }

  /** [text](address); an image is a link to it. */
  link(i, to, depth) {
    const near = this.text.slice(i, Math.min(to, i + LONGEST_LINK));
    const found = /^\[([^[\]]*)\]\(<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\)/.exec(near);
    const made = found && anchor(found[2]);
    if (!made) return null;
    this.into(made, i + 1, i + 1 + found[1].length, depth + 1);
    if (!made.hasChildNodes()) made.append(found[2]);
    return { node: made, end: i + found[0].length };
  }

  /** <https://…> */
  address(i, to) {
    const found = /^<(https?:\/\/[^\s<>]+)>/.exec(this.text.slice(i, Math.min(to, i + LONGEST_LINK)));
    const made = found && anchor(found[1]);
    if (!made) return null;
    this.plainInto(made, i + 1, i + 1 + found[1].length);
    return { node: made, end: i + found[0].length };
  }
}

/** A link that leads to http or https, or nothing. */
function anchor(address) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return null;
  const { protocol, href } = new URL(address);
  if (protocol !== "http:" && protocol !== "https:") return null;
  return element("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" });
}
